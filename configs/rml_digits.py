"""RML's Figure 2: how fast two perceptrons that teach each other become one, on digits.

Command, for each of the three variants, then one figure of all:
  python -m jaxssl.main --config=configs/rml_digits.py:direct --workdir=W/direct
  python -m jaxssl.main --config=configs/rml_digits.py:indirect --workdir=W/indirect
  python -m jaxssl.main --config=configs/rml_digits.py:noisy --workdir=W/noisy
  python -m jaxssl.report --workdir=W/direct --compare=W/indirect,W/noisy

Students learn from each other's predictions (direct), from those of each other's mean teachers
(indirect, if no variant is given), or from these with dropout and in views of their own (noisy). Of
1/60 of the images the labels are known. With the variant mnist the data are MNIST, as in the paper,
with --config.data.root=DIR for the folder that holds its four files; else the embedded digits.

report/coupling.png shows the total variation distance of the two teachers' softmax on unlabeled
batches, train/coupling in metrics.jsonl; of the two students', where there are no teachers.

Cost: two perceptrons of three layers a step, and their teachers; under a minute on digits.

Published: a figure without numbers. Direct, the distance approaches zero early; indirect, the
networks stay further apart; and with model noise more so. On digits it is so, too.

The paper says nothing of layers' widths, optimizer, noise or updates. They matter: at five times
the learning rate students jitter, and direct, two students are further apart than, indirect, their
averages. Views of digits change their light, as `views.rand_augment` does; CutMix is left out, as a
mixed image has no one label.
"""

from jaxssl import config as configs

SUPERVISION = {"direct": "direct", "indirect": "peer", "noisy": "peer"}


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(arg, supervision=(*SUPERVISION,), data=("mnist",))
    supervision = variant["supervision"] or "indirect"
    config = configs.default()
    configs.use_network(config, "mlp", dropout=0.2)
    with config.unlocked():
        config.data.update(name="digits", root="", split="1_60", size=8)
    config.update(crop=(8, 8), warmup=400, steps=600)
    config.batch.update(labeled=8, unlabeled=32)
    if variant["data"] == "mnist":
        with config.unlocked():
            config.data.update(name="mnist", root="data/mnist", set="mnist")
        config.update(crop=(28, 28), warmup=600, steps=3000)
        config.batch.update(labeled=32, unlabeled=128)
    noisy = supervision == "noisy"
    config.method = configs.rml(
        supervision=SUPERVISION[supervision],
        rectification=False,
        stages=1,
        model_noise=noisy,
        input_noise=noisy,
    )
    config.augment.update(scale=(1.0, 1.0), flip=False)
    config.optimizer.update(name="adamw", learning_rate=2e-4, weight_decay=2e-4)
    config.eval.update(every=100, mode="center_crop", batch=360)
    config.checkpoint.every = 200
    config.log.every = 10
    config.next = ("python -m jaxssl.report --workdir=W --compare=W2,W3 draws the three variants",)
    return config
