"""What scripts share: bad input is one line and exit code 2, as argparse has it; anything else is a traceback."""

import pytest

from gs_d2.command_line import bad_input_ends, parser_of


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a.yaml:\n  wrong"), "error: a.yaml: wrong"),
        (FileNotFoundError("no such config: a.yaml"), "error: no such config: a.yaml"),
        (KeyError("Dataset 'x' is not registered"), "not registered"),
        (ImportError("this needs timm"), "error: this needs timm"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, error, line):
    monkeypatch.setattr("sys.argv", ["tools/evaluate.py", "--predictions", "x"])

    @bad_input_ends()
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("evaluate.py: error: ") and line in printed.err


def test_anything_else_goes_through():
    with pytest.raises(ZeroDivisionError), bad_input_ends():
        print(1 / 0)
    with bad_input_ends():
        done = True
    assert done


def test_help_begins_with_the_scripts_words():
    text = "Does it.\n\n    tools/do.py --it"
    assert text in parser_of(text).format_help()
