from .config import GRPOConfig as GRPOConfig
from .grpo_trainer import GRPOTrainer as GRPOTrainer
from .losses import LOSS_TYPES as LOSS_TYPES
from .losses import group_advantages as group_advantages
from .losses import grpo_loss as grpo_loss
from .losses import loss_items as loss_items
