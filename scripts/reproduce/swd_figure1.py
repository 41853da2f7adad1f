"""Figure 1 of the SWD paper: vanilla against coupled weight decay, with SGD.

    python scripts/reproduce/swd_figure1.py --out=runs/swd_figure1 --data_dir=DIR

12 runs of 200 epochs (3 seeds): 3·10¹⁷ FLOPs, an hour on a GPU at 10¹⁴ FLOP/s. --scale=small:
ResNet18 of an eighth of the width, 6 epochs.

Neither scale has been run to its end.
"""

from reproduction import Sweep, main

DECAYS = {"decay": "vanilla,coupled"}
SCALES = {
    "paper": [Sweep("runs", "cifar_cnn.py:optimizer=sgd", {"model": "resnet18,vgg16"} | DECAYS)],
    "small": [Sweep("runs", "cifar_cnn.py:scale=small,optimizer=sgd", DECAYS, {"epochs": 6})],
}

if __name__ == "__main__":
    main(__doc__, SCALES, seeds=3)
