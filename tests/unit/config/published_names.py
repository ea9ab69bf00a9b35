"""Settings that other programs' own parsers know, older and newer ones, beside those of files.

LLaMA-Factory: ``hparams`` and transformers' TrainingArguments. PaddleNLP: ``llm/utils/argument.py``
and its quantization and training arguments. Megatron-LM: ``megatron/training/arguments.py``.
"""

NAMES = {
    ("finetune_generation.py", "LLaMA-Factory"): """
    low_cpu_mem_usage use_kv_cache use_reentrant_gc moe_aux_loss_coef mixture_of_depths
    train_from_scratch adapter_folder print_param_status new_special_tokens resize_vocab
    add_tokens om_hub_token quantization_device_map dpo_beta dpo_loss dpo_ftx simpo_gamma
    kto_chosen_weight ref_model reward_model pissa_init pissa_iter pissa_convert
    loraplus_lr_ratio loraplus_lr_embedding additional_target freeze_trainable_modules
    freeze_extra_modules freeze_vision_tower media_dir interleave_probs
    ignore_pad_token_for_loss eval_on_each_dataset tool_format default_system enable_thinking
    disable_shuffling early_stopping_steps do_sample temperature top_p top_k num_beams
    max_new_tokens skip_special_tokens galore_rank apollo_rank badam_mode use_swanlab
    swanlab_project lr_scheduler_kwargs tf32 fsdp fsdp_config data_seed save_safetensors
    eval_strategy evaluation_strategy eval_delay push_to_hub hub_model_id dataloader_pin_memory
    group_by_length torch_compile auto_find_batch_size average_tokens_across_devices
    include_effective_tokens_per_second
    """,
    ("finetune_generation.py", "PaddleNLP"): """
    qlora_weight_blocksize qlora_weight_double_quant qlora_weight_double_quant_block_size
    weight_blocksize quant_input_grad apply_hadamard normalize_logps offset_alpha
    attn_implementation use_sparse_head_and_loss_fn nola loraga loraga_init_iters lorapro
    lorapro_x_mode vera_alpha tensorwise_offload_optimizer save_rng_states
    multi_token_pred_depth
    """,
    ("run_pretrain.py", "Megatron-LM"): """
    no_position_embedding add_qkv_bias add_bias_linear use_checkpoint_args finetune vocab_file
    merge_file tokenizer_path dataloader_type rampup_batch_size exit_interval loss_scale
    initial_loss_scale hysteresis loss_scale_window wandb_project wandb_exp_name wandb_save_dir
    override_opt_param_scheduler exit_on_missing_checkpoint use_tp_pp_dp_mapping
    ckpt_fully_parallel_save no_gradient_accumulation_fusion
    no_async_tensor_model_parallel_allreduce enable_cuda_graph cuda_graph_impl
    no_persist_layer_norm num_dataset_builder_threads no_check_for_nan_in_loss_and_grad
    tensorboard_log_interval no_initialization delay_grad_reduce min_lr
    tensor_model_parallel_size data_path train_data_path
    """,
    ("merge_lora.py", "LLaMA-Factory"): """
    export_dir export_size export_device export_legacy_format export_quantization_bit
    export_quantization_dataset export_quantization_nsamples export_quantization_maxlen
    export_hub_model_id
    """,
}
