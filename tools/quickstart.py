"""The whole project on a small scale: finds faces in a photograph, then trains on generated ones and evaluates."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from gs_d2.command_line import bad_input_ends, folder_for, parser_of

ROOT = Path(__file__).resolve().parent.parent
PHOTOGRAPH = "demo/astronaut.jpg"
EXPECTED_AP = 60.0  # percent, on all faces of the held-out images


@bad_input_ends()
def main(argv=None):
    parser = parser_of(__doc__)
    parser.add_argument("--output", default="output/demo", help="folder for everything the demo writes")
    parser.add_argument("opts", nargs="*", help="config overrides, KEY VALUE ...")
    args = parser.parse_args(argv)
    output = folder_for("--output", args.output)
    datasets = output / "datasets"
    start = time.monotonic()

    run("demo/demo.py", "--input", ROOT / PHOTOGRAPH, "--output", output / "faces.jpg", "--confidence-threshold", "0.3")
    if not (datasets / "widerface" / "ground_truth" / "wider_hard_val.mat").exists():
        run("tools/synthesize_faces.py", "--output", datasets)
    # Threads that wait without spinning leave the cores to the data loader and to whatever else runs.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "DETECTRON2_DATASETS": str(datasets)}
    config = "configs/quick/demo.yaml"
    run("train_net.py", "--config-file", config, "OUTPUT_DIR", output, *args.opts, env=environment)
    inference = output / "inference" / "wider_face_val"
    pictures = output / "pictures"
    run(
        "tools/visualize_results.py", "--dataset", "wider_face_val", "--predictions", inference / "predictions",
        "--output", pictures, env=environment,
    )  # fmt: skip
    run("tools/sample_distribution.py", output / "metrics.json", "--output", output / "sample_distribution.png")

    results = json.loads((inference / "results.json").read_text())
    ap = 100 * results["all"]
    print(f"\nAP on all faces of the held-out images: {ap:.1f} % (at least {EXPECTED_AP:g} is expected)")
    print(f"It took {(time.monotonic() - start) / 60:.1f} minutes. Look at:")
    for what, where in (
        ("faces found in a photograph by the detector of the package", output / "faces.jpg"),
        ("detections beside ground truth", pictures),
        ("precision-recall curve", inference / "pr_curve.png"),
        ("sample distribution by scale (the paper's Fig. 2)", output / "sample_distribution.png"),
        ("training curves", f"tensorboard --logdir {output}"),
    ):
        print(f"  {what}: {where}")
    if ap < EXPECTED_AP:
        sys.exit("The demo's AP is lower than expected: something is wrong with this build or machine")


def run(script, *arguments, env=None):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    status = subprocess.run(command, env=env).returncode
    if status != 0:
        sys.exit(f"quickstart: {script} failed with exit code {status}; its messages are above")


if __name__ == "__main__":
    main()
