"""An LSTM language model on the Penn TreeBank: the language model of the SWD paper.

    python -m gnp.train --config=configs/ptb_lstm.py:decay=scheduled --workdir=runs/ptb \
        --config.data.data_dir=DIR

DIR holds ptb.train.txt, ptb.valid.txt and ptb.test.txt, as T. Mikolov prepared them (the text is
licensed by the LDC and does not come with gnp).

Arguments, as key=value with commas between them:
    decay      none, l2, decoupled, scheduled
    optimizer  adam, amsgrad, yogi, radam, adabound, padam, rmsprop, sgd
    gr         off, none, r, lambda, zero
    scale      paper, small (200 features in place of 512, 8 epochs, cosine; sizes are ours)

From the paper (Appendix B): 2 layers, 512 features, dropout 0.5, 20 streams, 35 words a step,
learning rate 1e-3, gradients clipped at 0.25. Ours, since the text at hand leaves it open: 200
epochs, the rate divided by 10 at epochs 100 and 150; λ = 1e-5 for l2 and scheduled, and for
decoupled decay 0.15, as strong as scheduled decay: clipping keeps v̄ near 0.25² over the number of
parameters, so that 1/√v̄ is near 15,000. With gr: a warmup of 10 % of the run, r = 0.1.

scale=small on two CPU cores, one seed: perplexity 134.6 on the validation text (190.9 after two
epochs) and 126.4 on the test text, in 42 minutes beside other work. scale=paper has not been run.
"""

from ml_collections import ConfigDict

from gnp import config as gnp_config

DECAYS = {"none": 0.0, "l2": 1e-5, "decoupled": 0.15, "scheduled": 1e-5}


def get_config(argument: str = "") -> ConfigDict:
    arguments = gnp_config.arguments(
        argument, decay="scheduled", optimizer="adam", gr="off", scale="paper"
    )
    gnp_config.choose("decay", arguments.decay, list(DECAYS))
    gnp_config.choose("scale", arguments.scale, ("paper", "small"))
    config = gnp_config.default()
    config.epochs = 200.0

    config.model.name = "lstm"
    config.model.dropout = 0.5
    config.data.name = "ptb"
    config.data.batch_size = 20
    config.data.sequence_length = 35
    config.eval.batch_size = 10

    config.optimizer.name = arguments.optimizer
    config.lr.base = 1e-3
    config.lr.schedule = "step"
    config.lr.drops = ("50%", "75%")
    config.weight_decay.kind = arguments.decay
    config.weight_decay.value = DECAYS[arguments.decay]
    config.clip_norm = 0.25

    config.gr.policy = arguments.gr
    if arguments.gr != "off":
        config.lr.warmup = "10%"

    if arguments.scale == "small":
        config.epochs = 8.0
        config.model.embedding_size = 200
        config.model.hidden_size = 200
        config.model.dropout = 0.25
        config.lr.base = 3e-3
        config.lr.schedule = "cosine"
        config.log.every = "10%"
        config.checkpoint.every = "1ep"
    return config
