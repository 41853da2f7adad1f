"""Figures 4, 6 and 8 of the SWD paper: SWD's factor, gradient norms, the Hessian's eigenvalues.

    python scripts/reproduce/swd_figure4.py --out=runs/swd_figure4 --data_dir=DIR

12 runs of 200 epochs (3 seeds): 3·10¹⁷ FLOPs, an hour on a GPU at 10¹⁴ FLOP/s. --scale=small:
ResNet18 of an eighth of the width on CIFAR-10, AdamW and AdamS, 6 epochs: SWD's gradient norm at
the end against AdamW's at equal speed.

Neither scale has been run to its end.
"""

from reproduction import Sweep, main

ADAM = {"optimizer": "adam", "decay": "decoupled,scheduled"}  # AdamW and AdamS
SCALES = {
    "paper": [Sweep("runs", "cifar_cnn.py", {"model": "resnet18,vgg16"} | ADAM, measured=50_000)],
    "small": [Sweep("runs", "cifar_cnn.py:scale=small", ADAM, {"epochs": 6}, measured=500)],
}

if __name__ == "__main__":
    main(__doc__, SCALES, seeds=3)
