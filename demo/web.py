#!/usr/bin/env python
"""A web page that finds the faces of a photograph, with the detector that comes with gs_d2 (needs gradio 6).

python demo/web.py

It serves this machine only, unless --host names another address (0.0.0.0 is all of this machine's). It sends nothing
anywhere. Photographs are kept in a temporary folder for at most twenty minutes, or until the page ends.
"""

import os
import signal
import sys
import tempfile

from gs_d2.command_line import bad_input_ends, parser_of
from gs_d2.web_page import detector_at, page


def main(argv=None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve (default 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to serve (default 7860)")
    args = parser.parse_args(argv)
    with bad_input_ends(RuntimeError):
        if not args.host.strip():
            raise ValueError("--host is empty")
        if not 0 < args.port < 2**16:
            raise ValueError(f"--port must be in 1 to 65535, got {args.port}")
        serve(args.host, args.port)
    return 0


def serve(host: str, port: int) -> None:
    """Serves the page until Ctrl-C is pressed."""
    with tempfile.TemporaryDirectory(prefix="gs_d2_web_") as folder:
        off = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
        os.environ.update(GRADIO_TEMP_DIR=folder, **off)  # read when gradio is imported
        import gradio

        detector_at((1.0,))  # what it lacks is said now
        fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # the default's are from elsewhere
        page(gradio).launch(
            server_name=host, server_port=port, share=False, ssr_mode=False, theme=gradio.themes.Default(**fonts)
        )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that the photographs are removed
    sys.exit(main())
