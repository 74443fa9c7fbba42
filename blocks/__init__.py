__version__ = "0.1.0"

"""Train image models from composable data blocks. `from blocks import *` gives the names below; each is imported when it is first used."""
import importlib

_NAMES = {
    'core': 'BlocksError DataError DeviceError ExportError ItemError MissingExtraError TrainingError WeightsError default_device set_seed',
    'data.source': '''get_files get_image_files FileGetter ImageGetter image_extensions parent_label RegexLabeller ColReader ItemGetter AttrGetter using_attr
        RandomSplitter TrainTestSplitter StratifiedSplitter GroupSplitter KFoldSplitter GrandparentSplitter IndexSplitter EndSplitter MaskSplitter FuncSplitter FileSplitter ColSplitter
        RandomSubsetSplitter''',
    'data.annotation': 'get_annotations',
    'data.archive': 'get_archive_files get_archive_images get_remote_images',
    'data.frame': 'Frame Resize RandomResizedCrop RandomCrop CropPad RatioResize',
    'data.block': 'Block ImageBlock',
    'data.label': 'CategoryBlock MultiCategoryBlock RegressionBlock',
    'data.place': 'MaskBlock PointBlock BBoxBlock BBoxLblBlock',
    'data.bands': 'BandsBlock',
    'data.sound': 'SpectrogramBlock',
    'data.augment': '''aug_transforms Flip Dihedral Rotate Zoom Warp RandomResizedCropGPU Brightness Contrast Saturation Hue RandomErasing Normalize
        imagenet_stats cifar_stats mnist_stats''',
    'data.policy': 'RandAugment TrivialAugmentWide',
    'data.sound_mask': 'FrequencyMask TimeMask',
    'data.loader': 'Loader Samples WeightedSampler',
    'data.audit': 'Audit audit_images find_label_errors label_errors',
    'data.dataloaders': 'DataLoaders',
    'data.datablock': 'DataBlock Datasets',
    'data.factory': 'ImageDataLoaders SegmentationDataLoaders',
    'model.head': 'AdaptiveConcatPool2d SigmoidRange VisionModel create_head mlp_head param_groups',
    'model.arch': 'create_body',
    'model.unet': 'DynamicUnet',
    'infer.predictions': 'Predictions',
    'infer.predictor': 'Predictor',
    'infer.card': 'inspect_export model_card',
    'infer.file': 'load_learner',
    'infer.runtime': 'OnnxPredictor',
    'infer.pipeline': 'CascadeDetector Pipeline YuNetDetector',
    'train.loss': 'BCEWithLogitsLossFlat CrossEntropyLossFlat DiceLoss FocalLossFlat L1LossFlat LabelSmoothingCrossEntropyFlat MSELossFlat',
    'train.metric': 'Metric accuracy accuracy_multi error_rate exp_rmspe mae mse msle rmse top_k_accuracy',
    'train.scores': '''APScoreBinary APScoreMulti BalancedAccuracy BrierScore BrierScoreMulti CohenKappa Dice DiceMulti ExpectedCalibrationError ExplainedVariance F1Score
        F1ScoreMulti FBeta FBetaMulti HammingLoss HammingLossMulti Jaccard JaccardCoeff JaccardCoeffMulti JaccardMulti MatthewsCorrCoef MatthewsCorrCoefMulti MeanIoU
        PearsonCorrCoef Perplexity Precision PrecisionMulti R2Score Recall RecallMulti RocAuc RocAucBinary RocAucMulti SpearmanCorrCoef foreground_acc per_class perplexity''',
    'train.optimizer': 'Ranger',
    'train.schedule': 'SchedCos SchedExp SchedLin SchedNo SchedPoly combine_scheds combined_cos',
    'train.callback': '''Callback EarlyStoppingCallback GradientAccumulation GradientClip ReduceLROnPlateau SaveModelCallback ShortEpochCallback TrackerCallback CancelBackwardException CancelBatchException CancelEpochException CancelFitException
        CancelStepException CancelTrainException CancelValidException''',
    'train.recorder': 'ProgressCallback Recorder',
    'train.logger': 'CSVLogger ShowGraphCallback TensorBoardCallback WandbCallback',
    'train.mix': 'CutMix MixUp',
    'train.average': 'BnFreeze EMACallback SWACallback',
    'train.memory': 'ActivationCheckpointing find_batch_size',
    'train.calibrate': 'calibration_curve find_temperature plot_calibration',
    'train.checkpoint': 'CheckpointCallback',
    'train.scheduling': 'ParamScheduler TorchScheduler',
    'train.lr_find': 'SuggestionMethod minimum slide steep valley',
    'train.strategy': 'FinetuneStrategy',
    'train.learner': 'Learner',
    'train.vision': 'cnn_learner unet_learner vision_learner',
    'train.detection': 'detection_learner mAP',
    'train.interpret': 'ClassificationInterpretation Interpretation',
    'train.gradcam': 'grad_cam plot_gradcam',
    'train.crossval': 'cross_validate',
    'train.compare': 'compare',
    'app.widgets': 'ImageClassifierCleaner',
}
_HOME = {name: f'blocks.{module}' for module, names in _NAMES.items() for name in names.split()}
_HOME |= dict.fromkeys('resnet18 resnet34 resnet50 resnet101 resnet152'.split(), 'torchvision.models') | {'L': 'fastcore.foundation', 'Path': 'pathlib'}

__all__ = sorted(_HOME)

def __getattr__(name):
    if name not in _HOME: raise AttributeError(f"module 'blocks' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value

def __dir__(): return sorted({*globals(), *__all__})
