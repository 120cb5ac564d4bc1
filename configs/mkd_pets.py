"""MKD on the Oxford-IIIT Pet data set: photographs of cats and dogs, pet or background.

Prepare it once. TensorFlow Datasets downloads 0.8 GB; TensorFlow is needed for this alone:
  pip install 'jaxssl[tfds-prepare]'
  tfds build oxford_iiit_pet --file_format=array_record      # into ~/tensorflow_datasets

Command:
  python -m jaxssl.main --config=configs/mkd_pets.py:1_16,r50 --workdir=W
  python -m jaxssl.main --config=configs/mkd_pets.py:small --workdir=W       # on a CPU

With another folder, add --data_dir=DIR there and --config.data.root=DIR here. Other sets are read
likewise: data.tfds_name, splits, image_key, label_key, id_key, classes and ignore say which set,
and what in it are images and labels.

There are 3680 training images; 1_16 (if no share is given) leaves the labels of 230. A pet's border
counts nowhere. Variants: the shares 1_64, 1_16, 1_8, 1_4; r50 (if none is given), or small, which
sees images at half their size and validates on a tenth of the 3669 test images; pretrained begins
with ImageNet features, alone or with small.

Cost: four networks a step; small takes one to two hours on two CPU cores, as estimated from the
demo of mkd_cityscapes.py.

Published: none for this split. What the labels alone give stands in the last line of the warm-up
phase in metrics.jsonl.
"""

from jaxssl import config as configs


def get_config(arg: str | None = None) -> configs.Config:
    variant = configs.choose(
        arg,
        split=("1_64", "1_16", "1_8", "1_4"),
        network=("r50", "small"),
        backbone=("r50", "pretrained"),
    )
    config = configs.default()
    with config.unlocked():
        config.data.update(
            name="tfds",
            root="",
            split=variant["split"] or "1_16",
            tfds_name="oxford_iiit_pet:4.*.*",
            splits={"train": "train", "val": "test"},
            image_key="image",
            label_key="segmentation_mask",
            id_key="file_name",
            classes=("2 background #000000", "1 pet #ff8000", "3 ignore"),
            ignore=(255,),
        )
    config.update(crop=(320, 320), steps=20_000, warmup=4000)
    config.eval.update(every=2000, batch=8)
    config.method = configs.mkd(ema_decay_max=0.99)
    if variant["network"] == "small":
        configs.use_small(config)
        config.update(crop=(160, 160), steps=2000, warmup=2000)
        config.batch.update(labeled=4, unlabeled=4)
        config.augment.scale = (0.35, 0.75)
        config.data.splits.val = "test[:10%]"
        config.eval.update(every=500, mode="half_res", batch=16)
        config.log.every = 20
    if variant["backbone"] == "pretrained":
        configs.use_pretrained(config)
        config.warmup = 0  # for the reason in jaxssl/auto.py
    else:
        # Pseudo-labels of networks that began with random weights are poor: trust them less.
        config.method.update(alpha=1.0, beta=0.25, feature_augmentation=False)
    config.next = ("the same with fewer labels: --config=configs/mkd_pets.py:1_64",)
    return config
