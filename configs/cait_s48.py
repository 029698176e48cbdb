"""CaiT-S48 on ImageNet-1k at 224 pixels; `:384`, `:distilled`, `:384,distilled`: see `imagenet.py`."""

from configs import imagenet

get_config = imagenet.cait("cait_s48")
