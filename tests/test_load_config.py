"""Reading configs: what is hostile, broken or misspelt is refused by file and key, the rest read as Detectron2 does."""

import re
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from gs_d2.config import add_gs_config, load_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Thirty lines for 2 ** 30 values.
LAUGHS = "A0: &a0 [1]\n" + "".join(f"A{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 31))
MERGED_LAUGHS = "A0: &a0 {B: 1}\n" + "".join(f"A{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 31))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "MODEL: !!python/object/apply:os.mkdir ['TRAP']"}, r"(?s)a\.yaml: .*python/object/apply"),
        ({"a": "_BASE_: b.yaml", "b": "MODEL: !!python/name:os.system"}, r"(?s)b\.yaml"),
        ({"a": "_BASE_: https://example.com/b.yaml"}, r"the _BASE_ https://example\.com/b\.yaml is not a file of this"),
        ({"a": "_BASE_: none.yaml"}, r"a\.yaml: the _BASE_ .*none\.yaml is not a file"),
        ({"a": "_BASE_: a.yaml"}, r"a\.yaml: nested too deeply, or its _BASE_ leads back"),
        ({"a": "_BASE_: b.yaml", "b": "_BASE_: a.yaml"}, r"a\.yaml: nested too deeply, or its _BASE_ leads back"),
        ({"a": LAUGHS}, r"a\.yaml: .*a\.yaml stands for more than 1 MiB when its aliases"),
        ({"a": MERGED_LAUGHS}, r"a\.yaml: .*a\.yaml stands for more than 1 MiB when its aliases"),
        ({"a": f"A: &x {'1' * 2**15}\nB: [{'*x, ' * 40}]"}, r"a\.yaml stands for more than 1 MiB"),
        ({"a": "_BASE_: b.yaml", "b": LAUGHS}, r"a\.yaml: .*b\.yaml stands for more than 1 MiB"),
        ({"a": "A: &x [1, *x]"}, r"a\.yaml has an alias \*x in what it stands for"),
        ({"a": "A: &x {B: [{C: *x}]}"}, r"a\.yaml has an alias \*x in what it stands for"),
        ({"a": "A: *x"}, r"(?s)a\.yaml: found undefined alias.*'x'"),
        ({"a": "MODEL: &x {A: 1}\nTEST: *x"}, r"a\.yaml: .*MODEL\.A"),
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


def config_files():
    return sorted(path for path in CONFIGS.rglob("*.yaml") if not path.name.startswith("_"))


@pytest.mark.parametrize("path", config_files(), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_runs_own_config_can_be_read(tmp_path, path):
    cfg = load_config(path, ["SEED", 3])
    (tmp_path / "config.yaml").write_text(cfg.dump())  # as Detectron2's default_setup
    found = load_config(tmp_path / "config.yaml")
    # YAML has no tuples. Detectron2 makes one where the default is one, but for those inside of others.
    cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
    cascade.BBOX_REG_WEIGHTS = tuple(map(list, cascade.BBOX_REG_WEIGHTS))
    assert found == cfg


def test_dumps_have_aliases():
    """Else the test above would test nothing of them."""
    assert any(re.search(r"\*id\d", load_config(path).dump()) for path in config_files())


def test_aliases_stand_for_their_values(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "INPUT: {GS: {SCALES: &x [1.0, 2.0]}, RANDOM_FLIP: &y none}\n"
        "TEST: {GS: {SCALES: *x}}\n"
        "MODEL: {GS: {SAMPLER: *y}, ROI_HEADS: {NAME: *y}}\n"
    )
    cfg = load_config(tmp_path / "a.yaml")
    assert cfg.INPUT.GS.SCALES == cfg.TEST.GS.SCALES == [1.0, 2.0]
    assert cfg.MODEL.GS.SAMPLER == cfg.MODEL.ROI_HEADS.NAME == "none"
