"""Figure 11 of the SWD paper: error over learning rate and weight decay.

    python scripts/reproduce/swd_figure11.py --out=runs/swd_figure11 --data_dir=DIR

50 runs of 200 epochs (one seed): 1.7·10¹⁸ FLOPs, 5 hours on a GPU at 10¹⁴ FLOP/s. --scale=small:
ResNet18 of an eighth of the width, 3 × 3 values, 2 epochs.

Neither scale has been run to its end.
"""

from reproduction import Sweep, main

SCALES = {
    scale: [
        Sweep(
            decay,
            f"cifar_cnn.py:scale={scale},decay={decay}",
            {
                "lr.base": f"logspace(1e-4,1e-2,{count})",
                "weight_decay.value": f"logspace({least},{most},{count})",
            },
            fields,
        )
        for decay, least, most in (("decoupled", 5e-2, 5), ("scheduled", 5e-5, 5e-3))
    ]
    for scale, count, fields in (("paper", 5, {}), ("small", 3, {"epochs": 2}))
}

if __name__ == "__main__":
    main(__doc__, SCALES, seeds=1)
