"""Table 5 of the GR paper: the warmup policies on Tiny-ImageNet and ImageNet.

    python scripts/reproduce/gr_table5.py --out=runs/gr_table5 --data_dir=DIR

100 runs (5 seeds): about 5·10²⁰ FLOPs, 60 GPU days, most of them for ImageNet, at 10¹⁴ FLOP/s.
--scale=small: a ViT of 4 layers and width 64 on Tiny-ImageNet, 16 epochs.

Neither scale has been run to its end.
"""

from reproduction import Sweep, main

POLICIES = "off,none,r,lambda,zero"
SCALES = {
    "paper": [
        Sweep(
            "tiny_imagenet",
            "tiny_imagenet_vit.py",
            {"model": "vit_ti,vit_s,vit_b", "gr": POLICIES},
        ),
        Sweep("imagenet", "imagenet_swin.py", {"gr": POLICIES}),
    ],
    "small": [Sweep("tiny_imagenet", "tiny_imagenet_vit.py:scale=small", {"gr": POLICIES})],
}

if __name__ == "__main__":
    main(__doc__, SCALES, seeds=5)
