"""Figures 4, 6 and 8 of the SWD paper: SWD's factor, gradient norms, the Hessian's eigenvalues.

    python scripts/reproduce/swd_figure4.py --out=runs/swd_figure4 --data_dir=DIR

12 runs of 200 epochs (3 seeds): 3·10¹⁷ FLOPs, an hour on a GPU at 10¹⁴ FLOP/s. --scale=small:
ResNet18 of an eighth of the width on 10,000 images of CIFAR-10, 15 epochs, AdamW and AdamS: SWD's
gradient norm at the end against AdamW's at equal speed. 3 seeds took 39 minutes on two CPU
cores (--jobs=2), and what came out is in the README. The full scale has not been run.
"""

from reproduction import Sweep, main

ADAM = {"optimizer": "adam", "decay": "decoupled,scheduled"}  # AdamW and AdamS
SMALL = {
    "data.train": "train[:20%]",
    "epochs": 15,
    "eval.every": "1ep",
    "checkpoint.every": "5ep",
    "checkpoint.keep": 1,
}


def small(name: str, kind: str, strength: float) -> Sweep:
    """One of the small sweeps: a kind of decay and its λ.

    With ten times the paper's λ, since the runs have so many fewer steps; AdamS once as the paper
    scales it (AdamW's / 1000), once so that it decays as much as AdamW in the first epoch.
    """
    config = f"cifar_cnn.py:scale=small,decay={kind}"
    return Sweep(name, config, fields=SMALL | {"weight_decay.value": strength}, measured=200)


SCALES = {
    "paper": [Sweep("runs", "cifar_cnn.py", {"model": "resnet18,vgg16"} | ADAM, measured=50_000)],
    "small": [
        small("adamw", "decoupled", 5.0),
        small("adams", "scheduled", 5e-3),
        small("adams_as_strong", "scheduled", 2e-2),
    ],
}

if __name__ == "__main__":
    main(__doc__, SCALES, seeds=3)
