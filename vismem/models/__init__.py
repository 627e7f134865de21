"""The models: backbones of vision-language families, and what VisMem adds to them."""

from vismem.models.processors import make_video_optional

make_video_optional()
