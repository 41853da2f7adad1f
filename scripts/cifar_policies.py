"""Trains a small ViT on CIFAR-10 under each warmup policy, and draws their test errors.

    python scripts/cifar_policies.py --out=runs/cifar_policies --data_dir=~/tensorflow_datasets

Each run has a work directory, OUT/POLICY-SEED. Started again, the command continues where it was
interrupted and does not repeat what is done. It ends with a Markdown table and OUT/error.png:
mean and standard deviation over the seeds.
"""

import contextlib
import math
import pathlib
import statistics
import subprocess
import sys

from gnp.analysis import figures, runs
from gnp.command_line import Parser, run
from gnp.config import GR_POLICIES
from gnp.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def main() -> int:
    """Trains what is not yet trained, then draws and prints."""
    parser = Parser("scripts/cifar_policies.py", __doc__)
    parser.prog = "python scripts/cifar_policies.py"
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder of the runs")
    parser.add_argument("--data_dir", help="folder of the TensorFlow Datasets")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each policy")
    parser.add_argument("--scale", default="small", help="small or paper")
    flags = parser.parse_args()

    done: dict[str, list[runs.Run]] = {policy: [] for policy in GR_POLICIES}
    for seed in range(flags.seeds):
        for policy in GR_POLICIES:
            workdir = flags.out / f"{policy}-{seed}"
            command = [
                *(sys.executable, "-m", "gnp.train", f"--workdir={workdir}"),
                f"--config={ROOT}/configs/cifar_vit.py:scale={flags.scale},gr={policy}",
                f"--config.seed={seed}",
            ]
            if flags.data_dir:
                command.append(f"--config.data.data_dir={flags.data_dir}")
            code = _call(command)
            if code == 130:  # interrupted, and saved
                return code
            if code:
                raise UserError(f"the run in {workdir} ended with exit code {code}")
            done[policy].append(runs.load(workdir))

    print("\n| policy | test error, % | training loss | wall time, s |\n|---|---|---|---|")
    for policy, of_policy in done.items():
        results = [r.result for r in of_policy if r.result]
        errors = [100 * result["test"]["error"] for result in results]
        spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
        losses = [result["train"]["loss"] for result in results]
        loss = math.nan if None in losses else statistics.mean(losses)
        seconds = statistics.mean(result["wall_time"] for result in results)
        print(
            f"| `{policy}` | {statistics.mean(errors):.2f}{spread} | {loss:.3f} | {seconds:.0f} |"
        )
    path = flags.out / "error.png"
    figures.error_curves(done).savefig(path, dpi=160)
    print(f"\n{path}")
    return 0


def _call(command: list[str]) -> int:
    """Runs a command to its end; on Ctrl-C, which it gets too, waits while it saves."""
    with subprocess.Popen(command) as process:
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                return process.wait()


if __name__ == "__main__":
    run(main)
