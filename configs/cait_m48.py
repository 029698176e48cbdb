"""CaiT-M48 on ImageNet-1k at 224 pixels; `:448`, `:distilled`, `:448,distilled`: see `imagenet.py`."""

from configs import imagenet

get_config = imagenet.cait("cait_m48")
