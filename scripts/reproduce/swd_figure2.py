"""Figures 2 and 3 of the SWD paper: gradient norms under weight decay, and BatchNorm.

    python scripts/reproduce/swd_figure2.py --out=runs/swd_figure2 --data_dir=DIR

36 runs of 200 epochs (3 seeds): 7·10¹⁷ FLOPs, 2 hours on a GPU at 10¹⁴ FLOP/s. --scale=small:
VGG16 of an eighth of the width, 3 epochs.

Neither scale has been run to its end.
"""

from reproduction import Sweep, main

GRID = {"model": "vgg16,vgg16_bn", "optimizer": "sgd,adam", "decay": "l2"}
SCALES = {
    "paper": [Sweep("runs", "cifar_cnn.py", GRID | {"weight_decay.value": "1e-5,1e-4,5e-4"})],
    "small": [
        Sweep(
            "runs",
            "cifar_cnn.py:scale=small",
            GRID | {"optimizer": "adam", "weight_decay.value": "1e-5,5e-4"},
            {"epochs": 3},
        )
    ],
}

if __name__ == "__main__":
    main(__doc__, SCALES, seeds=3)
