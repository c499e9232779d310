"""Layers of fxpress's own: plain, trainable torch modules. Importing the package registers all of them."""

from .channel_mask import ChannelMask as ChannelMask
from .selection_mask import SelectionMask as SelectionMask
