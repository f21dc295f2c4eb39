"""The recipes of quantize-well.md are recipes, and its table names methods that there are."""

import re
from pathlib import Path

import yaml

from fleetpress.compression.quantization import QUANTIZERS
from fleetpress.jobs.spec.recipe import Recipe

PAGE = (Path(__file__).parents[2] / "docs" / "quantize-well.md").read_text(encoding="utf-8")


def test_its_recipes_are_recipes() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    recipes = [Recipe.model_validate(yaml.safe_load(block)) for block in blocks]
    assert {recipe.quantize.method for recipe in recipes if recipe.quantize} == {"smallest_error", "gptq"}


def test_its_methods_are_methods() -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert named <= set(QUANTIZERS)
    assert {
        name for name, method in QUANTIZERS.items() if method.needs_inputs and not method.learns_codebook
    } <= named
