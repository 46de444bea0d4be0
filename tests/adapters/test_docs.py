import re
from pathlib import Path

import torch

from rfkernels import adapters

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()


def test_the_example_runs():
    scope: dict = {}
    exec(re.search(r"```python\n(.*?)```", PAGE, re.S)[1], scope)
    merged = scope["x"] @ scope["weight"].T + scope["bias"]
    torch.testing.assert_close(scope["y"], merged, rtol=1e-4, atol=1e-3)
    assert scope["form"].down.shape == (16, 48)


def test_every_family_has_a_row():
    table = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| [`")]
    documented = {name for cell in table for name in re.findall(r"\[`(\w+)`\]", cell)}
    families = {
        name
        for name in adapters.__all__
        if isinstance(getattr(adapters, name), type) and issubclass(getattr(adapters, name), adapters.Adapter)
    }
    assert documented == families - {"Adapter"}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (Path(__file__).parents[2] / "docs" / target).exists(), target


def test_names_of_the_table_are_those_of_the_families():
    """A name in a row that its file does not know would be wrong advice."""
    for name in ("LoHa", "SoKA", "SPLoRA", "SPLoPA", "LinearAdapter"):
        family = getattr(adapters, name)
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| [`{name}`]"))
        assert all(part.split(".")[0] in row for part in (*family.required, *family.optional))
