"""Figures 10 and 16 of the SWD paper, and its study of λ: error against weight decay.

    python scripts/reproduce/swd_figure10.py --out=runs/swd_figure10 --data_dir=DIR

45 runs of 200 epochs (3 seeds): 1.5·10¹⁸ FLOPs, 4 hours on a GPU at 10¹⁴ FLOP/s. --scale=small:
ResNet18 of an eighth of the width, 2 epochs.

Neither scale has been run to its end.
"""

from reproduction import Sweep, main

# As strong as one another by linear scaling: AdamW's λ is a thousand times that of SWD and L2.
WEAK, STRONG = "logspace(5e-6,5e-2,5)", "logspace(5e-3,5e1,5)"
SCALES = {
    scale: [
        Sweep(
            decay,
            f"cifar_cnn.py:scale={scale},decay={decay}",
            {"weight_decay.value": STRONG if decay == "decoupled" else WEAK},
            {} if scale == "paper" else {"epochs": 2},
        )
        for decay in ("l2", "decoupled", "scheduled")
    ]
    for scale in ("paper", "small")
}

if __name__ == "__main__":
    main(__doc__, SCALES, seeds=3)
