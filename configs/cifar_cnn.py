"""CNNs on CIFAR-10 and CIFAR-100: the comparison of the SWD paper, model × optimizer × decay.

    python -m gnp.train --config=configs/cifar_cnn.py:model=vgg16,decay=scheduled --workdir=runs/cnn

Arguments, as key=value with commas between them:
    data       cifar10, cifar100
    model      resnet18, resnet34, resnet50, vgg16, vgg16_bn, densenet121, googlenet
    optimizer  adam, amsgrad, yogi, radam, adabound, padam, rmsprop, sgd
    decay      none, l2, vanilla, coupled, decoupled, scheduled
    gr         off, none, r, lambda, zero
    scale      paper, small (an eighth of the width, of DenseNet's growth, and 16 epochs; for CPUs,
               sizes are ours)

From the paper (Appendix B): 200 epochs, batch 128, crops with 4 pixels of padding and flips; the
learning rate is 1e-3, for SGD 0.1 with momentum 0.9, divided by 10 at epochs 80 and 160, on
CIFAR-100 at 100 and 150; λ = 5e-4 for l2 and scheduled, and 0.5 for decoupled decay (AdamW), which
is as strong by linear scaling. AdamS is optimizer=adam,decay=scheduled; SGDS is
optimizer=sgd,decay=scheduled.

Ours: coupled decay is as strong as the paper's (5e-4 with SGD, 0.5 otherwise), and so is vanilla
decay at the first learning rate, λ = η₀ times that. With gr, 10 % of the run are a warmup of the
rate, and r = 0.1.

Not run to its end at either scale. scale=small of ResNet18 takes 0.21 s a step on two CPU cores,
22 minutes for its 16 epochs.
"""

from ml_collections import ConfigDict

from gnp import config as gnp_config


def get_config(argument: str = "") -> ConfigDict:
    arguments = gnp_config.arguments(
        argument,
        data="cifar10",
        model="resnet18",
        optimizer="adam",
        decay="scheduled",
        gr="off",
        scale="paper",
    )
    names = ["resnet18", "resnet34", "resnet50", "vgg16", "vgg16_bn", "densenet121", "googlenet"]
    gnp_config.choose("data", arguments.data, ("cifar10", "cifar100"))
    gnp_config.choose("model", arguments.model, names)
    sgd = arguments.optimizer == "sgd"
    rate, coupled = (0.1, 5e-4) if sgd else (1e-3, 0.5)
    decays = {
        "none": 0.0,
        "l2": 5e-4,
        "vanilla": rate * coupled,
        "coupled": coupled,
        "decoupled": coupled,
        "scheduled": 5e-4,
    }
    gnp_config.choose("decay", arguments.decay, list(decays))
    gnp_config.choose("scale", arguments.scale, ("paper", "small"))
    config = gnp_config.default()
    config.epochs = 200.0
    config.steps_per_call = 1  # convolutions are slow in a loop on CPUs; a GPU may have more

    config.model.name = arguments.model
    config.data.name = arguments.data
    config.data.batch_size = 128
    config.data.augment = "basic"

    config.optimizer.name = arguments.optimizer
    config.lr.base = rate
    config.lr.schedule = "step"
    config.lr.drops = ("50%", "75%") if arguments.data == "cifar100" else ("40%", "80%")
    config.weight_decay.kind = arguments.decay
    config.weight_decay.value = decays[arguments.decay]

    config.gr.policy = arguments.gr
    if arguments.gr != "off":
        config.lr.warmup = "10%"

    if arguments.scale == "small":
        config.epochs = 16.0
        config.checkpoint.every = "1ep"
        if arguments.model == "densenet121":
            config.model.growth_rate = 4
        else:
            config.model.width = 8
    return config
