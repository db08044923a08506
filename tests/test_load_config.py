"""Reading configs: what is hostile, broken or misspelt is refused by file and key, the rest read as Detectron2 does."""

import re
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from gs_d2.config import add_gs_config, load_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "MODEL: !!python/object/apply:os.mkdir ['TRAP']"}, r"(?s)a\.yaml: .*python/object/apply"),
        ({"a": "_BASE_: b.yaml", "b": "MODEL: !!python/name:os.system"}, r"(?s)b\.yaml"),
        ({"a": "_BASE_: https://example.com/b.yaml"}, r"the _BASE_ https://example\.com/b\.yaml is not a file of this"),
        ({"a": "_BASE_: none.yaml"}, r"a\.yaml: the _BASE_ .*none\.yaml is not a file"),
        ({"a": "_BASE_: a.yaml"}, r"a\.yaml: nested too deeply, or its _BASE_ leads back"),
        ({"a": "_BASE_: b.yaml", "b": "_BASE_: a.yaml"}, r"a\.yaml: nested too deeply, or its _BASE_ leads back"),
        ({"a": "MODEL: &x {A: 1}\nTEST: *x"}, r"a\.yaml has a YAML alias"),
        ({"a": "_BASE_: b.yaml", "b": "A: &x [1]\nB: [*x, *x]"}, r"b\.yaml has a YAML alias"),
        ({"a": "A: " + "[" * 1200 + "]" * 1200}, r"a\.yaml: nested too deeply"),
        ({"a": "A: " + "1" * 2**20}, r"a\.yaml has more than 1 MiB"),
        ({"a": "- 1"}, r"a\.yaml"),
        ({"a": "text"}, r"a\.yaml"),
        ({"a": ""}, r"a\.yaml"),
        ({"a": "\0"}, r"a\.yaml"),
        ({"a": "VERSION: 2\nMODEL: 3"}, r"(?s)a\.yaml: .{,620}config key: MODEL$"),
        ({"a": "TEST: {GS: {NO_SUCH_KEY: 1}}"}, r"a\.yaml: .*NO_SUCH_KEY"),
        ({"a": "TEST: {GS: {FLIP: [1]}}"}, r"a\.yaml: .*FLIP"),
    ],
)
def test_a_hostile_or_broken_config_is_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("TRAP", str(tmp_path / "trap")))
    with pytest.raises(ValueError, match=message) as error:
        load_config(tmp_path / "a.yaml")
    assert str(tmp_path / "a.yaml") in str(error.value)
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("opts", [["MODEL.NO_SUCH_KEY", 1], ["MODEL"], ["TEST.GS.FLIP", "text"], ["MODEL.GS.X.Y", 1]])
def test_wrong_overrides_are_named(opts):
    with pytest.raises(ValueError, match=re.escape(f"opts {opts}: ")):
        load_config(CONFIGS / "quick/demo.yaml", opts)


def test_a_loaded_config_is_as_detectron2_reads_it():
    for name in ("quick/demo.yaml", "wider/fpn_finest_sampling_r18.yaml"):
        cfg = get_cfg()
        add_gs_config(cfg)
        cfg.merge_from_file(str(CONFIGS / name))
        cfg.merge_from_list(["TEST.GS.FLIP", True])
        found = load_config(CONFIGS / name, ["TEST.GS.FLIP", True])
        assert found == cfg and type(found) is type(found.MODEL.GS) is type(cfg)
