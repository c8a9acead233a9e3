"""Pretrained generators as sequences of named, editable layers, and loading them from files."""

from pyrewrite.generators.base import Generator, numbered_latents
from pyrewrite.generators.dcgan import DCGAN, DCGANShape
from pyrewrite.generators.editable import EditableModule, as_editable
from pyrewrite.generators.loading import BUNDLED, load_generator, register_family
from pyrewrite.generators.network import Activation, EditableLayer, EditableNetwork
from pyrewrite.generators.progan import ProGAN, ProGANShape
from pyrewrite.generators.saving import save_generator
from pyrewrite.generators.stylegan2 import StyleGAN2, StyleGAN2Shape
from pyrewrite.generators.stylegan3 import StyleGAN3, StyleGAN3LayerShape, StyleGAN3Shape

__all__ = [
    "BUNDLED",
    "DCGAN",
    "Activation",
    "DCGANShape",
    "EditableLayer",
    "EditableModule",
    "EditableNetwork",
    "Generator",
    "ProGAN",
    "ProGANShape",
    "StyleGAN2",
    "StyleGAN2Shape",
    "StyleGAN3",
    "StyleGAN3LayerShape",
    "StyleGAN3Shape",
    "as_editable",
    "load_generator",
    "numbered_latents",
    "register_family",
    "save_generator",
]
