"""Vision transformers on ImageNet at 224 × 224 pixels: the GR paper's recipe, streamed.

    python -m gnp.train --config=configs/imagenet_vit.py:model=vit_s,gr=zero \
        --config.data.data_dir=~/imagenet --workdir=runs/imagenet_vit

Arguments, as key=value with commas between them:
    model      vit_ti, vit_s, vit_b
    gr         off, none, r, lambda, zero
    optimizer  adam, rmsprop
    data       imagenet (the folders train/ and val/), imagenet2012 (TensorFlow Datasets')
    augment    crop, heavy
    scale      paper, small (2 blocks of width 64 at 64 × 64 pixels, batch 64, 4 epochs; to try a
               part of the data on a CPU, sizes are ours)

From the GR paper (Table 3, for smaller images): Adam, cosine, weight decay 0.03, gradient clipping,
r 0.1, ratio 1. From the SWD paper (Appendix B, for ImageNet): crops of 8 to 100 % of the area with
sides of 3:4 to 4:3, flips, batch 256, 90 epochs. Ours, since neither trains a transformer on
ImageNet in the text at hand: learning rate 1e-3, a warmup of 10 % of the run, patches of 16 × 16,
ImageNet's published mean and deviation, a decoupled decay, and clipping at 1. augment=heavy adds
RandAugment, random erasing, mixup, CutMix and label smoothing.

scale=small on a folder of generated JPEGs of mixed sizes learns them in 30 s on two CPU cores (test
error 8.75 %), which shows that the recipe runs. scale=paper has not been run.
"""

from ml_collections import ConfigDict

from gnp import config as gnp_config


def get_config(argument: str = "") -> ConfigDict:
    arguments = gnp_config.arguments(
        argument,
        model="vit_s",
        gr="zero",
        optimizer="adam",
        data="imagenet",
        augment="crop",
        scale="paper",
    )
    gnp_config.choose("model", arguments.model, ("vit_ti", "vit_s", "vit_b"))
    gnp_config.choose("data", arguments.data, ("imagenet", "imagenet2012"))
    gnp_config.choose("augment", arguments.augment, ("crop", "heavy"))
    gnp_config.choose("scale", arguments.scale, ("paper", "small"))
    config = gnp_config.default()
    config.epochs = 90.0

    config.model.name = arguments.model
    config.dtype = "bfloat16"
    config.data.name = arguments.data
    config.data.image_size = 224
    config.data.batch_size = 256
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.data.augment = "random_resized_crop,flip"
    if arguments.augment == "heavy":
        config.data.augment += (
            ",rand_augment:2:9,random_erasing:0.25,mixup_or_cutmix:0.8:1,label_smoothing:0.1"
        )

    config.optimizer.name = arguments.optimizer
    config.lr.base = 1e-3
    config.lr.schedule = "cosine"
    config.lr.warmup = "10%"
    config.weight_decay.kind = "decoupled"
    config.weight_decay.value = 0.03
    config.clip_norm = 1.0

    config.gr.policy = arguments.gr
    config.gr.radius = 0.1
    config.gr.ratio = 1.0
    config.checkpoint.every = "1ep"

    if arguments.scale == "small":
        config.epochs = 4.0
        config.dtype = "float32"
        config.data.image_size = 64
        config.data.batch_size = 64
        config.model.width = 64
        config.model.depth = 2
        config.model.num_heads = 4
    return config
