"""Code of the documents whose systems this package replaces, as it stands there; what is left out is said."""

from __future__ import annotations

PREDECESSORS = (
    "badam",
    "badam.utils",
    "block_optim",
    "colossalai.nn.optimizer",
    "colossalai.nn.optimizer.distributed_adafactor",
    "colossalai.nn.optimizer.galore",
    "peft_pretraining.GoLore",
)


def renamed(code: str, package: str = "colossal_bcd.compat") -> str:
    """The code with what it imports from a predecessor imported from this package."""
    for predecessor in PREDECESSORS:
        code = code.replace(f"from {predecessor} import", f"from {package} import")
    return code


# Document 000 (README of BlockOptimizers), Usage, first block.
BREAD_BADAM = """
from block_optim import BlockOptimizer

optimizer = BlockOptimizer(
    base_optimizer=original_optimizer, # can be any torch.Optimizer
    named_parameters_list=list(model.named_parameters()), 
    switch_block_every=100, # optimize each block sub-problem by 100 steps
    switch_mode="random", # update order of blocks, one can choose "random" (random reshuffling update order), "ascending" (update from input layer to output layer), or "descending" (update from output layer to input layer). The default is "random".
)
"""  # noqa: E501, W291

# Document 000, On-the-fly SGD Based Correction, with "same arguments as BAdam" written out.
BREAD_SGD = """
optimizer = BlockOptimizer(
    base_optimizer=original_optimizer, named_parameters_list=list(model.named_parameters()), # same arguments as BAdam
    sgd_mode="all", # options: ["all", "partial", "disabled"]
    sgd_lr_scaling=5., # the learning rate scaling of SGD update. SGD usually uses larger lr than Adam.
    sgd_use_sign=False # if True, use signSGD update. SignSGD update usually converges faster than SGD when the model is not well trained, e.g. under the scenario of training from scratch.
)
"""  # noqa: E501

# Document 000, Low-rank Based Correction, cut where the user makes the base optimizer.
BREAD_PEFT = """
# NOTE: make sure that the model has been transformed into peft model with LoRA adapeters, as shown below
from peft import LoraConfig, TaskType, get_peft_model
peft_config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1)
model = get_peft_model(original_model, peft_config)
"""

BREAD_LORA = """
optimizer = BlockOptimizer(
    base_optimizer=original_optimizer, named_parameters_list=list(model.named_parameters()), # same arguments as BAdam
    lora_mode="all" # options: ["all", "partial"]
)
"""

# Document 001 (first README of BAdam), Quick Start, first block.
BADAM_ASCENDING = """
from block_optim import BlockOptimizer

# before training, add this line to wrap the original optimizer
optimizer = BlockOptimizer(
    base_optimizer=original_optimizer, # can be any torch.Optimizer
    named_parameters_list=list(model.named_parameters()), 
    switch_block_every=50, # switch to the new block every 50 updates
    switch_mode="ascending", # update order of blocks, "ascending" means update the input layers first
    verbose=2 # information level, will print trainable parameters when setting to 2
)
"""  # noqa: W291

# Document 001, Quick Start, second block.
BADAM_MATRICES = """
block_prefix_list = []
for i in range(31):
    layer_prefix = [
        [f"model.layers.{i}.self_attn.q_proj."],
        [f"model.layers.{i}.self_attn.k_proj."],
        [f"model.layers.{i}.self_attn.v_proj."],
        [f"model.layers.{i}.self_attn.o_proj."],
        [f"model.layers.{i}.mlp.gate_proj."],
        [f"model.layers.{i}.mlp.up_proj."],
        [f"model.layers.{i}.mlp.down_proj."],
    ]
    block_prefix_list.extend(layer_prefix)

optimizer = BlockOptimizer(
    base_optimizer=original_optimizer,
    named_parameters_list=list(model.named_parameters_list), 
    switch_block_every=50,
    switch_mode="ascending",
    verbose=2,
    block_prefix_list=block_prefix_list # set the block list
)
"""  # noqa: W291

# Document 001, Partition by parameter ratio.
SPARSE = """
# param_groups = optimizer.param_groups
from block_optim import SparseGradOptimizer

optimizer = SparseGradOptimizer(
    param_groups=param_groups, # param_group of torch.Optimizer, the same as the original optimizer
    named_parameters_list=list(self.model.named_parameters()),
    switch_every=100, # switch to the new block every 100 updates
    update_ratio=0.1, # ratio of trainable weight for each parameter
    mask_mode = "adjacent", # choices: ["adjacent", "scatter"], see Note below for more explanation
    lr=1e-5,
    betas=(0.9, 0.999), # betas for Adam update
    eps=1e-8, # eps of Adam update
)
"""

# Document 002 (later README of BAdam), Partition by Module (A Single GPU), first block.
BADAM_RANDOM = """
from badam import BlockOptimizer

# before training, add this line to wrap the original optimizer
optimizer = BlockOptimizer(
    base_optimizer=original_optimizer, # can be any torch.Optimizer
    named_parameters_list=list(model.named_parameters()), 
    switch_block_every=100, # switch to the new block every 50 updates, the $K$ Adam steps in paper. It can be set adaptively by $K = n/(BD)$, where $n$ is the number of training data points, $B$ is the batch size, and $D$ is the number of blocks in BAdam; see "Hyperparameter Suggestion" section for a detailed explaination about setting this hyperparameter. 
    switch_mode="random", # update order of blocks, one can choose "random" (random reshuffling update order), "ascending" (update from input layer to output layer), or "descending" (update from output layer to input layer). The default is "random".
    verbose=2 # information level, will print trainable parameters when setting to 2
)
"""  # noqa: E501, W291

# Document 002, more partition strategies, blocks of self_attn and mlp modules.
BADAM_MODULES = """
# block partition by self_attn and mlp modules
block_prefix_list = []
for i in range(32):
    layer_prefix = [
        [f"model.layers.{i}.self_attn."],
        [f"model.layers.{i}.mlp."],
    ]
    block_prefix_list.extend(layer_prefix)

optimizer = BlockOptimizer(
    base_optimizer=original_optimizer,
    named_parameters_list=list(model.named_parameters()), 
    switch_block_every=100,
    switch_mode="random",
    verbose=2,
    block_prefix_list=block_prefix_list # set the block list
)
"""  # noqa: W291

# Document 002, more partition strategies, blocks of matrix modules.
BADAM_MATRICES_RANDOM = """
#block partition by matrix modules
block_prefix_list = []
for i in range(32):
    layer_prefix = [
        [f"model.layers.{i}.self_attn.q_proj."],
        [f"model.layers.{i}.self_attn.k_proj."],
        [f"model.layers.{i}.self_attn.v_proj."],
        [f"model.layers.{i}.self_attn.o_proj."],
        [f"model.layers.{i}.mlp.gate_proj."],
        [f"model.layers.{i}.mlp.up_proj."],
        [f"model.layers.{i}.mlp.down_proj."],
    ]
    block_prefix_list.extend(layer_prefix)

optimizer = BlockOptimizer(
    base_optimizer=original_optimizer,
    named_parameters_list=list(model.named_parameters_list), 
    switch_block_every=100,
    switch_mode="random",
    verbose=2,
    block_prefix_list=block_prefix_list # set the block list
)
"""  # noqa: W291

# Document 002, Partition by Module (Model Parallel), first and second block, with the dots written out.
ZERO3 = """
from badam import BlockOptimizer

optimizer = BlockOptimizer(
    base_optimizer=original_optimizer, named_parameters_list=list(model.named_parameters()),
    ds_zero3_enabled=True # set it to True
)

model, ds_optimizer = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)

# create the reference to the ds_optimizer, for the purpose of setup ZeRO-3's environment
optimizer.ds_optimizer = ds_optimizer
"""

# Document 002, Partition by Module (Model Parallel), third block.
CALLBACK = """
from badam.utils import BAdamCallback

callbacks = original_callbacks.append(BAdamCallback) # add the callback
trainer = YourTrainerClass(
    ...,
    callbacks=callbacks
)
"""

# Document 002, Partition by Parameter Ratio.
RATIO = """
from badam import BlockOptimizerRatio

optimizer = BlockOptimizerRatio(
    param_groups=param_groups, # param_group of torch.Optimizer, the same as the original optimizer
    named_parameters_list=list(self.model.named_parameters()),
    switch_every=100, # switch to the new block every 100 updates
    update_ratio=0.1, # ratio of trainable weight for each parameter
    mask_mode = "adjacent", # choices: ["adjacent", "scatter"], see Note below for more explanation
    lr=1e-6,
    betas=(0.9, 0.999), # betas for Adam update
    eps=1e-8, # eps of Adam update
)
"""

# Document 003 (ColossalAI's tutorial on distributed optimizers), steps 1 to 5.
TUTORIAL = """
from transformers import LlamaModel, LlamaConfig
from colossalai.nn.optimizer.distributed_adafactor import DistributedAdaFactor
from colossalai.booster import Booster
from colossalai.booster.plugin import HybridParallelPlugin
import colossalai
import torch
colossalai.launch_from_torch()
# Init Llama from huggingface
configuration = LlamaConfig()
model = LlamaModel(configuration).cuda()
criterion = lambda x: x.mean()
dist_optim = DistributedAdaFactor(model.parameters())

plugin = HybridParallelPlugin(tp_size=2, zero_stage=2, pp_size=1, enable_all_optimization=True)
booster = Booster(plugin=plugin)
# You should also pass in your own dataset.
model, dist_optim, criterion, dataloader, _ = booster.boost(model, dist_optim, criterion)
steps = 10
for step in range(steps):
    input_ids = torch.ones(1, 100, device="cuda", dtype=torch.int)
    attention_mask = input_ids.clone()
    outputs = model(input_ids.cuda(), attention_mask.cuda())
    loss = criterion(outputs.last_hidden_state)
    booster.backward(loss, dist_optim)
    dist_optim.step()
    dist_optim.zero_grad()
"""

# Document 003, "GaLore special handling".
GALORE = """
from colossalai.nn.optimizer.galore import get_galore_param_groups
from colossalai.nn.optimizer import DistGaloreAwamW
optim = DistGaloreAwamW(
    get_galore_param_groups(model, decay=1e-2, rank=8),
    lr=lr,
    betas=(beta1, beta2),
    eps=eps,
    nbits=8,
    percentile_clipping=100,
    block_wise=True,
    min_8bit_size=4096,
)
"""

# Document 004 (README of GoLore), Usage, first block.
WRAP = """
from peft_pretraining.GoLore import ReLoRaModel, ReLoRaLinear
model = ReLoRaModel(
            model,
            r=args.rank,
            lora_dropout=0,
            target_modules=["attn", "attention", "mlp"],
            scale = args.scale,
            keep_original_weights=True,
            lora_only=not need_linear_weight,
            quantize=args.quantize,
            use_double_quant=args.use_double_quant,
        )
"""

# Document 004, Usage, second block.
FORWARD_TYPE = """
if isinstance(model, ReLoRaModel):
    reset_relora = (step % args.gradient_accumulation_steps == 0 or step == len(train_dataloader) - 1) and completed_steps % args.update_proj_gap == 0
    model._config.forward_type = reset_relora
"""  # noqa: E501

# Document 004, Usage, third block.
REFRESH = """
if isinstance(model, ReLoRaModel):
    if reset_relora:
        use_rand = (completed_steps / args.max_train_steps) >= args.rand_ratio
        logger.info(f"Performing lora reset at step {completed_steps}, use {'rand' if use_rand else 'svd'}")
        n_lora_restarts += 1
        model.merge_and_reinit(optimizer.optimizer, use_rand)
"""
