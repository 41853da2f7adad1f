"""Table 1 of the GR paper: GR with and without learning-rate warmup, for Adam and RMSProp.

    python scripts/reproduce/gr_table1.py --out=runs/gr_table1 --data_dir=DIR

240 runs of 300 epochs (5 seeds): 8·10¹⁹ FLOPs, 9 GPU days at 10¹⁴ FLOP/s. --scale=small: a ViT of
4 layers and width 64 on CIFAR-10, Adam, 6 epochs.

Neither scale has been run to its end.
"""

from reproduction import Sweep, main

SCALES = {
    "paper": [
        Sweep(
            "runs",
            "cifar_vit.py",
            {
                "model": "vit_ti,vit_s,vit_b",
                "optimizer": "adam,rmsprop",
                "data": "cifar10,cifar100",
                "gr": "off,none",
                "lr.warmup": "0ep,40ep",
            },
        )
    ],
    "small": [
        Sweep(
            "runs",
            "cifar_vit.py:scale=small",
            {"gr": "off,none", "lr.warmup": "0ep,3ep"},
            {"epochs": 6},
        )
    ],
}

if __name__ == "__main__":
    main(__doc__, SCALES, seeds=5)
