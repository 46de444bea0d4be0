"""`import rfkernels` loads nothing heavy; its names arrive on first use."""

import subprocess
import sys

import pytest


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def loaded_after(statement: str) -> set[str]:
    return set(run(f"import sys\n{statement}\nprint(*sys.modules)").split())


def test_import_loads_nothing_heavy():
    loaded = loaded_after("import rfkernels")
    assert loaded.isdisjoint(
        {"torch", "numpy", "PIL", "safetensors", "tqdm", "typer", "rich", "rfkernels._C"}
    )


def test_command_line_needs_torch_only_where_it_computes():
    loaded = loaded_after("import rfkernels.cli.app")
    assert "typer" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "rfkernels._C"})


def test_ops_do_not_load_the_command_line_or_the_models():
    loaded = loaded_after("import rfkernels.ops")
    assert "rfkernels._C" in loaded
    assert loaded.isdisjoint({"typer", "rich", "PIL", "rfkernels.models.emoji", "rfkernels.pipeline"})


def test_a_picture_needs_no_compiler():
    # torch._dynamo takes over a second to import; an initialiser on a meta tensor would do it.
    loaded = loaded_after("import rfkernels; rfkernels.generate('a red heart', steps=1)")
    assert "rfkernels.models.emoji" in loaded and "torch._dynamo" not in loaded


@pytest.mark.parametrize(
    "name",
    [
        "Pipeline",
        "adapters",
        "explain",
        "formats",
        "generate",
        "load_lora",
        "merge_lora",
        "models",
        "nn",
        "ops",
        "quantize",
        "samplers",
        "set_adapters",
        "unload_lora",
        "unmerge_lora",
        "__version__",
    ],
)
def test_public_names_are_there_and_listed(name: str):
    import rfkernels

    assert getattr(rfkernels, name) is getattr(rfkernels, name)
    assert name in dir(rfkernels)


def test_submodules_do_not_hide_public_functions():
    code = "import rfkernels, rfkernels.diagnosis, rfkernels.pipeline, rfkernels.cli.generate"
    assert run(f"{code}; print(callable(rfkernels.explain), callable(rfkernels.generate))") == "True True"


def test_unknown_name_is_an_attribute_error():
    import rfkernels

    with pytest.raises(AttributeError, match="has no attribute 'flux'"):
        _ = rfkernels.flux


def test_version_is_text():
    import rfkernels

    assert rfkernels.__version__[0].isdigit()
