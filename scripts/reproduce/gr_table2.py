"""Table 2 and Figures 1, 2 and 4 of the GR paper: the warmup policies.

    python scripts/reproduce/gr_table2.py --out=runs/gr_table2 --data_dir=DIR

300 runs of 300 epochs (5 seeds): 1.2·10²⁰ FLOPs, 14 GPU days at 10¹⁴ FLOP/s. --scale=small: a ViT
of 4 layers and width 64 on CIFAR-10, Adam, 6 epochs of which 3 warm up; 3 seeds take 40 minutes on
two CPU cores, and what came out is in the README. The full scale has not been run.
"""

from reproduction import Sweep, main

POLICIES = "off,none,r,lambda,zero"
SCALES = {
    "paper": [
        Sweep(
            "runs",
            "cifar_vit.py",
            {
                "model": "vit_ti,vit_s,vit_b",
                "optimizer": "adam,rmsprop",
                "data": "cifar10,cifar100",
                "gr": POLICIES,
            },
        )
    ],
    "small": [
        Sweep(
            "runs",
            "cifar_vit.py:scale=small",
            {"gr": POLICIES},
            {"epochs": 6, "lr.base": 4e-3, "lr.warmup": "3ep"},
        )
    ],
}

if __name__ == "__main__":
    main(__doc__, SCALES, seeds=5)
