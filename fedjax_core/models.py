"""Models: those that come with the library, and how to bring your own."""

from fedjax_core.learning.features import as_float as as_float
from fedjax_core.learning.models import Model as Model
from fedjax_core.learning.models import from_flax as from_flax
from fedjax_core.learning.models import from_functions as from_functions
from fedjax_core.learning.vision import emnist_cnn as emnist_cnn
from fedjax_core.learning.vision import linear as linear
from fedjax_core.learning.vision import two_nn as two_nn
