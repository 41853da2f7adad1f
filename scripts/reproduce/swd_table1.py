"""Table 1 and Figures 9, 14, 15 and 19 of the SWD paper: AdamS and other optimizers on CIFAR.

    python scripts/reproduce/swd_table1.py --out=runs/swd_table1 --data_dir=DIR

108 runs of 200 epochs (3 seeds): 5.3·10¹⁸ FLOPs, 0.6 GPU days at 10¹⁴ FLOP/s. --scale=small:
ResNet18 of an eighth of the width on CIFAR-10, AdamW, AdamS and SGD, 6 epochs.

Neither scale has been run to its end.
"""

from reproduction import Sweep, main

OTHERS = "sgd,adam,amsgrad,adabound,padam,yogi,radam"
ON_CIFAR10 = {"data": "cifar10", "model": "resnet18,vgg16"}
ON_CIFAR100 = {"data": "cifar100", "model": "densenet121,googlenet"}
ADAM = {"optimizer": "adam", "decay": "decoupled,scheduled"}  # AdamW and AdamS
L2 = {"optimizer": OTHERS, "decay": "l2"}
SCALES = {
    "paper": [
        Sweep("cifar10_adam", "cifar_cnn.py", ON_CIFAR10 | ADAM),
        Sweep("cifar10_others", "cifar_cnn.py", ON_CIFAR10 | L2),
        Sweep("cifar100_adam", "cifar_cnn.py", ON_CIFAR100 | ADAM),
        Sweep("cifar100_others", "cifar_cnn.py", ON_CIFAR100 | L2),
    ],
    "small": [
        Sweep("adam", "cifar_cnn.py:scale=small", ADAM, {"epochs": 6}),
        Sweep("sgd", "cifar_cnn.py:scale=small,optimizer=sgd,decay=l2", {}, {"epochs": 6}),
    ],
}

if __name__ == "__main__":
    main(__doc__, SCALES, seeds=3)
