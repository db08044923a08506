"""demo/web.py: the page is served to this machine only, and nothing is sent or kept."""

import os
import sys
from types import SimpleNamespace

import pytest
from web import main


def test_without_gradio(monkeypatch, refused):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with refused("pip install gradio$"):
        main([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "--port must be in 1 to 65535, got 0"),
        (["--port", "x"], "int"),
        (["--host", " "], "--host is"),
    ],
)
def test_wrong_arguments(arguments, message, refused):
    with refused(message):
        main(arguments)


class Gradio:
    """Stands in for the module, and keeps what the page is made of and how it is served."""

    class Error(Exception):
        def __init__(self, message, print_exception):
            super().__init__(message)

    def __init__(self):
        self.blocks, self.served, self.clicked = {}, {}, []
        self.themes = SimpleNamespace(Default=lambda **fonts: fonts)

    def __getattr__(self, name):
        def component(*_, **options):
            if name == "Blocks":
                self.blocks = options
            return self

        return component

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def change(self, *_):
        pass

    def click(self, function, *_, **__):
        self.clicked.append(function)

    def launch(self, **options):
        self.served = {**options, "environment": dict(os.environ)}


@pytest.mark.parametrize("arguments", [[], ["--host", "0.0.0.0", "--port", "8000"]])
def test_how_it_is_served(monkeypatch, arguments):
    gradio = Gradio()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setattr("web.detector_at", lambda scales: None)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "GRADIO_RUN_HISTORY"):
        monkeypatch.setenv(name, "")  # as before, afterwards
    assert main(arguments) == 0
    served, environment = gradio.served, gradio.served["environment"]
    assert (served["server_name"], served["server_port"]) == (("0.0.0.0", 8000) if arguments else ("127.0.0.1", 7860))
    assert served["share"] is False and gradio.blocks["analytics_enabled"] is False
    assert environment["GRADIO_ANALYTICS_ENABLED"] == environment["GRADIO_RUN_HISTORY"] == "False"
    assert not os.path.exists(environment["GRADIO_TEMP_DIR"]), "the photographs are gone"
    with pytest.raises(Gradio.Error, match="choose a photograph first"):  # what the page says
        gradio.clicked[0](None, 0.5, [1.0], "boxes")
