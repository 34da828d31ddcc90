"""`quantadapt plugin new`: what it writes works as it stands, and it overwrites nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from installing import installed

from quantadapt import Adapter, Backend, __version__, cli, scaffold
from quantadapt.registry import registry
from quantadapt.scaffold import Kind

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT / "docs" / "tutorial" / "quantadapt-absmax"
NAMES = ("demo8", "x", "my-int8", "a1-b2-c3", "backend", "merge", "any", "tensor", "true", "test")

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Call:
    """Return a function that runs `quantadapt plugin new` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["plugin", "new", *arguments])
        return int(ended.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture
def install(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Return a function that installs a distribution until the test is over."""
    with ExitStack() as undo:
        yield lambda folder: undo.enter_context(installed(folder, tmp_path))


def tree(folder: Path) -> dict[str, str]:
    ignored = ("__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache")
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file() and not set(path.parts) & set(ignored)
    }


# What it writes ----------------------------------------------------------------------------------


def test_it_writes_what_it_lists_and_says_what_to_do(new: Call) -> None:
    code, out, err = new("demo8")
    assert (code, err) == (0, "")
    assert tree(Path("quantadapt-demo8")) == scaffold.contents("demo8")
    for line in ("cd quantadapt-demo8", "pip install -e '.[test]'", "pytest", "--backend demo8"):
        assert line in out
    assert "src/quantadapt_demo8/layer.py" in out


def test_the_tutorials_plugin_is_what_it_writes() -> None:
    """Templates and tutorial are one: change the templates, then write the tutorial's anew with
    `scaffold.contents("absmax")`."""
    found, made = tree(TUTORIAL), scaffold.contents("absmax")
    assert sorted(found) == sorted(made)
    for path, text in made.items():
        assert found[path] == text, path


def suite_passes(folder: Path, wanted: str, capsys) -> int:
    """Run a plugin's own tests and return how many there were."""
    arguments = [str(folder / "tests"), f"--rootdir={folder}", "-q", "-k", wanted]
    quiet = [f"-pno:{name}" for name in ("cacheprovider", "timeout", "faulthandler", "xdist")]
    code = pytest.main([*arguments, *quiet, "-Wignore", "-c", str(folder / "pyproject.toml")])
    output = capsys.readouterr().out
    assert code == 0, output
    passed = re.search(r"(\d+) passed", output)
    assert passed
    return int(passed[1])


LAYERS = "original or forward or biases or live or requantizing or bits_per"
KINDS: dict[Kind, tuple[str, int]] = {
    "backend": ("(lora or original or forward or biases or save or live) and not adalora", 25),
    "calibrated": (f"(lora or {LAYERS}) and not InLargerGroups and not adalora", 25),
    "activations": (f"(lora or {LAYERS}) and not adalora", 25),
    "adapter": ("OnFourBits", 20),
}
"""Kind of plugin -> which of its tests to run here, and how many those are at least. `.ci/run` runs
all of them on the tutorial's, which is a backend."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_plugin_passes_the_conformance_suite(kind, new, install, tmp_path, capsys) -> None:
    name = f"demo-{kind}"
    flags = () if kind == "backend" else (f"--{kind}",)
    assert new(name, "--output", "kit/demo", *flags)[0] == 0
    folder = tmp_path / "kit" / "demo"
    install(folder)
    record = registry().record(Adapter if kind == "adapter" else Backend, name)
    assert str(registry().provenance(record)) == f"{name} (quantadapt-{name} 0.1.0)"
    wanted, least = KINDS[kind]
    assert suite_passes(folder, wanted, capsys) > least


def test_calibration_makes_the_outputs_better(new, install, tmp_path) -> None:
    """The scaffold's scales change outputs less than those that look at the weights alone."""
    import torch

    new("demo4", "--calibrated")
    install(tmp_path / "quantadapt-demo4")
    from quantadapt_demo4.layer import Demo4Linear

    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 32)
    linear.weight.data.normal_()
    x = torch.randn(256, 64) * torch.linspace(0.05, 3, 64)
    plain = Demo4Linear.from_linear(linear, 32)
    shown = Demo4Linear.from_linear(linear, 32, x.t() @ x)
    expected = linear(x).double()
    errors = [(layer(x).double() - expected).norm(dim=0) for layer in (shown, plain)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()  # row by row
    assert errors[0].norm() < 0.99 * errors[1].norm()
    again = Demo4Linear(shown.codes, shown.scale, shown.bias)
    assert torch.equal(again(x), shown(x))
    assert shown.codes.numel() == linear.weight.numel() // 2


def test_activations_are_rounded_to_the_nearest_of_127_steps(new, install, tmp_path) -> None:
    import torch

    new("demo88", "--activations")
    install(tmp_path / "quantadapt-demo88")
    from quantadapt_demo88.layer import Demo88Linear

    linear = torch.nn.Linear(64, 32)
    layer, x = Demo88Linear.from_linear(linear), torch.randn(3, 7, 64)
    x[0, 0] = 0
    step = x.double().abs().amax(dim=-1, keepdim=True) / 127
    near = torch.where(step > 0, (x / step).round() * step, 0.0)
    expected = near @ layer.dequantize().double().t() + linear.bias.double()
    assert (layer(x) - expected).norm() / expected.norm() < 1e-6
    assert (layer(x) - linear(x)).norm() / linear(x).norm() < 0.02


def test_a_layer_that_does_not_fit_is_named(new, install, tmp_path) -> None:
    import torch

    import quantadapt as qa
    from quantadapt.errors import PlanRefused

    new("demo8")
    install(tmp_path / "quantadapt-demo8")
    quantizer = registry().backend("demo8").quantizer(group_size=64)
    assert quantizer.misfit(128, 3) is None
    assert quantizer.misfit(100, 3) == "64 does not divide its 100 inputs"
    model = torch.nn.Sequential(torch.nn.Linear(128, 3), torch.nn.Linear(100, 3))
    with pytest.raises(PlanRefused, match="1: 64 does not divide its 100 inputs"):
        qa.quantize(model, "demo8", group_size=64)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_layer_survives_zeros_and_low_precision(new, install, tmp_path, dtype: str) -> None:
    import torch

    new("demo8")
    install(tmp_path / "quantadapt-demo8")
    from quantadapt_demo8.layer import Demo8Linear

    linear = torch.nn.Linear(32, 3, dtype=getattr(torch, dtype))
    linear.weight.data[0] = 0
    linear.weight.data[1] = torch.linspace(-3, 3, 32)
    layer = Demo8Linear.from_linear(linear, None)
    error = (layer.dequantize() - linear.weight).norm() / linear.weight.norm()
    assert error < 0.01
    assert layer.dequantize()[0].eq(0).all()
    assert layer(torch.zeros(2, 32, dtype=linear.weight.dtype)).dtype == linear.weight.dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_sound_whatever_the_name(name: str, kind: Kind) -> None:
    files = scaffold.contents(name, kind)
    module = name.replace("-", "_")
    assert not any(re.search(r"@\w+@", text) for text in files.values())
    project = tomllib.loads(files["pyproject.toml"])["project"]
    assert project["name"] == f"quantadapt-{name}"
    assert project["entry-points"]["quantadapt"] == {name: f"quantadapt_{module}"}
    assert project["dependencies"][0] == f"quantadapt>={__version__.rpartition('.')[0]}"
    steps = yaml.safe_load(files[".github/workflows/test.yml"])["jobs"]["test"]["steps"]
    assert steps[-1] == {"run": "pytest"}
    for path, text in files.items():
        if path.endswith(".py"):
            assert not shadowed(ast.parse(text, path)), path


def shadowed(module: ast.Module) -> set[str]:
    """Return the imported names that a class of the module hides."""
    imports = [n for n in ast.walk(module) if isinstance(n, ast.Import | ast.ImportFrom)]
    imported = {alias.asname or alias.name for node in imports for alias in node.names}
    return imported & {n.name for n in module.body if isinstance(n, ast.ClassDef)}


@pytest.mark.parametrize("kind", KINDS)
def test_importing_the_plugin_loads_no_torch(new: Call, kind: Kind) -> None:
    new("demo8", *(() if kind == "backend" else (f"--{kind}",)))
    code = "import sys, quantadapt_demo8; assert not {'torch', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd="quantadapt-demo8/src", check=True)


def test_it_loads_nothing_heavy(new: Call, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom quantadapt import cli\n"
        "try: cli.main(['plugin', 'new', 'demo8'])\nexcept SystemExit: pass\n"
        "bad = {'torch', 'peft', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "quantadapt-demo8" / "pyproject.toml").exists()


# What it refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Demo8", "fix: try 'demo8'"),
        ("my_int8", "fix: try 'my-int8'"),
        ("8bit", "begins with a letter"),
        ("", "'' is no name for a backend"),
        ("../demo8", "fix: try 'demo8'"),
        ("demo--8", "single hyphens"),
        ("x" * 41, "40 at most"),
        ("quantadapt-demo8", "fix: write 'demo8'"),
        ("hqq", "the name 'hqq' is taken by hqq (quantadapt"),
        ("bnb-nf4", "the name 'bnb-nf4' is taken by bnb (quantadapt"),
        ("bnb", "the name 'bnb' is taken by bnb (quantadapt"),
        ("builtin", "the name 'builtin' is taken by builtin"),
        ("layerwise", "fix: choose another name"),
        ("--adapter Demo8", "is no name for an adapter: that is lower-case letters"),
        ("--adapter dora", "the name 'dora' is taken by builtin"),
        ("--adapter xlora", "the name 'xlora' is taken by a method of PEFT"),
        ("--adapter prefix-tuning", "the name 'prefix-tuning' is taken by a method of PEFT"),
        ("--adapter peft", "fix: choose another name"),
        ("--adapter --calibrated demo8", "--adapter and --calibrated are two plugins"),
    ],
)
def test_a_bad_name_is_refused(new: Call, tmp_path: Path, name: str, words: str) -> None:
    *flags, name = name.split(" ") if name.startswith("--") else [name]
    code, _, err = new(*flags, "--", name)
    assert code == 2
    assert words in err
    assert not list(tmp_path.iterdir())


def test_the_name_of_a_module_is_taken(new: Call, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "quantadapt_demo8.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    code, _, err = new("demo8")
    assert code == 2
    assert "by an installed quantadapt_demo8" in err


def test_a_folder_in_use_is_left_alone(new: Call, tmp_path: Path) -> None:
    (tmp_path / "quantadapt-demo8").mkdir()
    (tmp_path / "quantadapt-demo8" / "mine.txt").write_text("mine")
    code, _, err = new("demo8")
    assert code == 1
    assert "the folder is not empty\n    fix: name a new folder" in err
    assert tree(tmp_path) == {"quantadapt-demo8/mine.txt": "mine"}


def test_a_file_in_the_way_is_left_alone(new: Call, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    code, _, err = new("demo8", "--output", "there")
    assert code == 1
    assert "a file is in the way" in err
    assert tree(tmp_path) == {"there": "mine"}


def test_an_empty_folder_is_taken(new: Call, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert new("demo8", "-o", "empty")[0] == 0
    assert (tmp_path / "empty" / "pyproject.toml").exists()


def test_the_current_folder_is_not_replaced(new: Call, tmp_path: Path) -> None:
    """It would be renamed away under the feet of the shell that is in it."""
    code, _, err = new("demo8", "--output", ".")
    assert code == 1
    assert "this is the folder that you are in" in err
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing_behind(new: Call, tmp_path: Path, monkeypatch) -> None:
    def fails(self: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fails)
    code, _, err = new("demo8")
    assert code == 1
    assert "not enough disk space" in err
    assert not list(tmp_path.iterdir())
