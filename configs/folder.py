"""Any model on your own images, in a folder for each class.

    python -m gnp.train --config=configs/folder.py:model=vit_ti --config.data.data_dir=photos \
        --config.data.image_size=128 --workdir=runs/photos

The images lie in photos/train/CLASS/ and photos/val/CLASS/ (JPEG, PNG, WebP, …, of any size). If
there is only photos/CLASS/, set a part apart to test on:

    --config.data.train=train[:90%] --config.data.test=train[90%:]

Arguments, as key=value with commas between them:
    model    vit_ti, vit_s, vit_b, swin_t, swin_s, swin_b, cait_xxs12, cait_xxs24, cait_xs12,
             cait_s12, resnet18, resnet34, resnet50, vgg16, vgg16_bn, densenet121, googlenet
    gr       off, none, r, lambda, zero
    augment  crop, heavy

All values are ours: 100 epochs, batch 64, AdamW with a rate of 5e-4 and a decay of 0.05, cosine, a
tenth of the run is a warmup; GR with r = 0.05. For few images begin from weights that are trained
already (`--config.model.pretrained=FILE --config.data.image_size=224`), with a lower rate, as
--config.lr.base=5e-5 and --config.epochs=20.
"""

from ml_collections import ConfigDict

from gnp import config as gnp_config


def get_config(argument: str = "") -> ConfigDict:
    arguments = gnp_config.arguments(argument, model="vit_ti", gr="zero", augment="crop")
    gnp_config.choose("augment", arguments.augment, ("crop", "heavy"))
    config = gnp_config.default()
    config.epochs = 100.0
    config.steps_per_call = 1  # convolutions are slow in a loop on CPUs

    config.model.name = arguments.model
    config.data.name = "folder"
    config.data.image_size = 224
    config.data.batch_size = 64
    config.data.augment = "random_resized_crop,flip"
    if arguments.augment == "heavy":
        config.data.augment += (
            ",rand_augment:2:9,random_erasing:0.25,mixup_or_cutmix:0.8:1,label_smoothing:0.1"
        )

    config.lr.base = 5e-4
    config.lr.schedule = "cosine"
    config.lr.warmup = "10%"
    config.weight_decay.kind = "decoupled"
    config.weight_decay.value = 0.05
    config.clip_norm = 1.0

    config.gr.policy = arguments.gr
    config.gr.radius = 0.05
    config.gr.ratio = 1.0
    config.checkpoint.every = "5%"
    return config
