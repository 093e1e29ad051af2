from . import lm_eval as lm_eval
from . import nanogcg as nanogcg
