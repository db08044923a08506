"""What the documentation says can be done as it stands: its Python runs, its commands parse, its links lead somewhere.

A ```python block of a page is run after the page's blocks before it, in a folder with a picture and random weights, and
as a doctest if it has prompts. One that cannot be run begins with the comment `# not run: <why>`; it is compiled, and
what it imports must be there. Of ```bash blocks every command is given to the parser of the script that it names, and
the config keys in it to that config.
"""

import argparse
import ast
import doctest
import importlib
import importlib.util
import pkgutil
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import gs_d2
from gs_d2.inference.face_detector import load_config

ROOT = Path(__file__).resolve().parent.parent
# Without benchmarks/results, which are records of their day: their commands stay as they were.
PAGES = [
    path
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])
    if ROOT / "output" not in path.parents
]
NOT_RUN = "# not run: "


def blocks_of(text: str, language: str) -> list[tuple[int, str]]:
    """First line number and text of each block of that language."""
    found = re.finditer(rf"^```{language}[^\n]*\n(.*?)^```\s*$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def pages_with(language):
    return [pytest.param(path, id=name_of(path)) for path in PAGES if blocks_of(path.read_text(), language)]


@pytest.fixture(scope="module")
def newcomers_folder(tmp_path_factory):
    """What the reader of a page has: the checkout's folders, `make demo`'s weights (here random), a picture."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("configs", "tools", "docs"):
        (folder / name).symlink_to(ROOT / name)
    from detectron2.modeling import build_model

    weights = folder / "output" / "demo" / "model_final.pth"
    weights.parent.mkdir(parents=True)
    cfg = load_config(ROOT / "configs" / "quick" / "demo.yaml")
    torch.save({"model": build_model(cfg).state_dict()}, weights)
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "picture.jpg")
    return folder


@pytest.fixture
def registries_as_before(monkeypatch):
    """Names that an example registers are gone afterwards."""
    from detectron2.data import DatasetCatalog
    from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
    from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY

    from gs_d2.engine import trainer

    for registry in (BACKBONE_REGISTRY, META_ARCH_REGISTRY, PROPOSAL_GENERATOR_REGISTRY):
        monkeypatch.setattr(registry, "_obj_map", dict(registry._obj_map))
    monkeypatch.setattr(trainer, "EVALUATORS", dict(trainer.EVALUATORS))
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)


def run_doctest(source: str, namespace: dict, where: str, line: int) -> None:
    test = doctest.DocTestParser().get_doctest(source, namespace, where, where, line)
    test.globs = namespace  # what it defines stays for the blocks after it
    report = []
    result = doctest.DocTestRunner().run(test, out=report.append, clear_globs=False)
    assert result.attempted and not result.failed, "".join(report)


def check_without_running(source: str) -> None:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), (
                    alias.name
                )


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run(page, newcomers_folder, registries_as_before, monkeypatch, capsys):
    monkeypatch.chdir(newcomers_folder)
    namespace = {"__name__": "__main__"}
    for line, source in blocks_of(page.read_text(), "python"):
        where = f"{name_of(page)}:{line}"
        if source.lstrip().startswith(NOT_RUN):
            check_without_running(source)
        elif ">>> " in source:
            run_doctest(source, namespace, where, line)
        else:
            exec(compile("\n" * (line - 1) + source, where, "exec"), namespace)
            check_printed(source, capsys.readouterr().out)


def check_printed(source: str, printed: str) -> None:
    """A `print(...)` at the start of a line ends with a comment of what it prints."""
    promised = re.findall(r"^print\(.*\)  # (.+)$", source, re.MULTILINE)
    assert printed.splitlines() == promised


MODULES = [
    module.name
    for module in pkgutil.walk_packages(gs_d2.__path__, "gs_d2.")
    if module.name.rsplit(".")[-1] not in ("_C", "__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_run(name, newcomers_folder, monkeypatch):
    monkeypatch.chdir(newcomers_folder)
    module = importlib.import_module(name)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        if test.examples:
            report = []
            assert not doctest.DocTestRunner().run(test, out=report.append).failed, "".join(report)


@pytest.mark.parametrize("name", ["box_iou", "two_pass_match", "group_subsample"])
def test_every_op_has_an_example(name):
    from gs_d2 import ops

    assert doctest.DocTestParser().get_examples(getattr(ops, name).__doc__)


class Parsed(BaseException):
    """Ends a script where it has parsed its command line."""


def commands_of(block: str) -> list[list[str]]:
    """Words of each command; comments, variables before it and redirections are left out."""
    commands = []
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(re.sub(r"\$\{?\w+\}?", "1", line), posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        words = list(lexer)
        while words:
            end = next((i for i, word in enumerate(words) if set(word) <= set(";&|<>")), len(words))
            command = words[:end]
            while command and re.fullmatch(r"[A-Z]\w*=.*", command[0]):
                command = command[1:]
            if command:
                commands.append(command)
            words = words[end + 1 :]
    return commands


def check_command(words: list[str], monkeypatch) -> None:
    if "..." in words:
        words = words[: words.index("...")]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"the Makefile has no {words[1:]}"
        return
    if words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), words[2]
        return
    script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if script is None:
        return  # a program of the system
    path = ROOT / words[script]
    assert path.is_file(), f"there is no {words[script]}"
    if "parse_args" not in path.read_text():
        assert words[script + 1 :] == [], f"{words[script]} takes no arguments"
        return
    given = parse(path, words[script + 1 :], monkeypatch)
    config = getattr(given, "config_file", None)
    opts = [word for word in getattr(given, "opts", None) or [] if word != "--"]
    for file in config if isinstance(config, list) else [config] if config else []:
        load_config(ROOT / file, opts)


def parse(script: Path, arguments: list[str], monkeypatch) -> argparse.Namespace:
    """What the script's own parser makes of the arguments."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        raise Parsed(parse_args(self, args, namespace))

    with monkeypatch.context() as patch, pytest.raises(Parsed) as parsed:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        runpy.run_path(str(script), run_name="__main__")
    return parsed.value.args[0]


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_are_those_of_the_scripts(page, monkeypatch):
    for line, block in blocks_of(page.read_text(), "bash"):
        for command in commands_of(block):
            try:
                check_command(command, monkeypatch)
            except (AssertionError, SystemExit, ValueError, FileNotFoundError) as error:
                pytest.fail(f"{name_of(page)}, block of line {line}, {' '.join(command)}: {error!r}")


@pytest.mark.parametrize(
    "command",
    [
        "python tools/no_such_script.py",
        "python tools/evaluate.py wider_face --predictions x --ground-truth y --no-such-flag",
        "python tools/evaluate.py wider_faces --predictions x --ground-truth y",
        "python train_net.py --config-file configs/no_such.yaml",
        "python train_net.py --config-file configs/quick/demo.yaml MODEL.NO_SUCH_KEY 1",
        "python train_net.py --no-such-flag",
        "python -m gs_d2.no_such_module",
        "A=1 python train_net.py --config-file configs/quick/demo.yaml --num-gpus two && make demo",
        "make no-such-target",
        "for i in 1 2; do python tools/no_such_script.py; done",
    ],
)
def test_a_wrong_command_is_found(command, monkeypatch):
    with pytest.raises((AssertionError, SystemExit, ValueError, FileNotFoundError)):
        for words in commands_of(command):
            check_command(words, monkeypatch)


@pytest.mark.parametrize("source", ["import gs_d2.nothing", "from gs_d2.ops import nothing", "x = = 1"])
def test_a_block_that_is_not_run_is_still_checked(source):
    with pytest.raises((ImportError, AssertionError, SyntaxError)):
        check_without_running(f"{NOT_RUN}it needs nothing\n{source}\n")


@pytest.mark.parametrize("page", [pytest.param(path, id=name_of(path)) for path in PAGES])
def test_links_and_paths_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"
    for path in re.findall(r"`((?:gs_d2|benchmarks|configs|csrc|demo|dev|examples|tests|tools)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or (ROOT / "configs" / path).exists(), f"{name_of(page)} names {path}"


@pytest.mark.parametrize("note", sorted(ROOT.glob("benchmarks/results/*.md")), ids=name_of)
def test_links_of_the_notes_lead_somewhere(note):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", note.read_text()):
        assert "://" in target or (note.parent / target).exists(), f"{name_of(note)} links to {target}"


def test_code_and_configs_cite_no_note_of_a_day():
    """Notes are replaced by newer ones; docs/measurements.md quotes the newest."""
    for path in (*ROOT.glob("gs_d2/**/*.py"), *ROOT.glob("configs/**/*.yaml"), *ROOT.glob("csrc/**/*.*")):
        assert not re.search(r"\b20\d\d-\d\d-\d\d-|results/20", path.read_text()), path
