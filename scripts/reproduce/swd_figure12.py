"""Figures 12 and 20 of the SWD paper: cosine with warm restarts.

    python scripts/reproduce/swd_figure12.py --out=runs/swd_figure12 --data_dir=DIR

12 runs of 210 epochs, 14 + 28 + 56 + 112 (3 seeds): 4·10¹⁷ FLOPs, an hour on a GPU at 10¹⁴
FLOP/s. --scale=small: ResNet18 of an eighth of the width, restarts after 1, 3 and 7 epochs.

Neither scale has been run to its end.
"""

from reproduction import Sweep, main

ADAM = {"optimizer": "adam", "decay": "l2,decoupled,scheduled"}
RESTARTS = {"lr.schedule": "restarts"}
SCALES = {
    "paper": [
        Sweep("adam", "cifar_cnn.py", ADAM, RESTARTS | {"epochs": 210}),
        Sweep("sgd", "cifar_cnn.py:optimizer=sgd,decay=l2", {}, RESTARTS | {"epochs": 210}),
    ],
    "small": [
        Sweep(
            "adam",
            "cifar_cnn.py:scale=small",
            ADAM,
            RESTARTS | {"lr.restart_period": "1ep", "epochs": 7},
        )
    ],
}

if __name__ == "__main__":
    main(__doc__, SCALES, seeds=3)
