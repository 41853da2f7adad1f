"""Table 4 of the GR paper: the warmup policies for Swin and CaiT.

    python scripts/reproduce/gr_table4.py --out=runs/gr_table4 --data_dir=DIR

350 runs of 300 epochs (5 seeds): 4.5·10¹⁹ FLOPs, 5 GPU days at 10¹⁴ FLOP/s. --scale=small: small
Swin and CaiT, 3 epochs.

Neither scale has been run to its end.
"""

from reproduction import Sweep, main

POLICIES = "off,none,r,lambda,zero"
SMALL = {"epochs": 3, "lr.warmup": "50%"}
SCALES = {
    "paper": [
        Sweep(
            "swin",
            "cifar_swin.py",
            {"model": "swin_t,swin_s,swin_b", "data": "cifar10,cifar100", "gr": POLICIES},
        ),
        Sweep(
            "cait",
            "cifar_cait.py",
            {
                "model": "cait_xxs12,cait_xxs24,cait_xs12,cait_s12",
                "data": "cifar10,cifar100",
                "gr": POLICIES,
            },
        ),
    ],
    "small": [
        Sweep("swin", "cifar_swin.py:scale=small", {"gr": POLICIES}, SMALL),
        Sweep("cait", "cifar_cait.py:scale=small", {"gr": POLICIES}, SMALL),
    ],
}

if __name__ == "__main__":
    main(__doc__, SCALES, seeds=5)
