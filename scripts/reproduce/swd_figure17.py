"""Figure 17 of the SWD paper: longer training.

    python scripts/reproduce/swd_figure17.py --out=runs/swd_figure17 --data_dir=DIR

18 runs of 200 to 800 epochs (3 seeds): 1.4·10¹⁸ FLOPs, 4 hours on a GPU at 10¹⁴ FLOP/s.
--scale=small: ResNet18 of an eighth of the width, 2 to 8.

Neither scale has been run to its end.
"""

from reproduction import Sweep, main

ADAM = {"optimizer": "adam", "decay": "decoupled,scheduled"}
SCALES = {
    "paper": [Sweep("runs", "cifar_cnn.py", ADAM | {"epochs": "200,400,800"})],
    "small": [Sweep("runs", "cifar_cnn.py:scale=small", ADAM | {"epochs": "2,4,8"})],
}

if __name__ == "__main__":
    main(__doc__, SCALES, seeds=3)
