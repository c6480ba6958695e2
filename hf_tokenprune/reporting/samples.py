"""What a report looks at: texts or images, as a model reads them."""

from pathlib import Path

from transformers import AutoImageProcessor, DataCollatorWithPadding

from ..depth import BATCH, image_depths, text_depths
from ..errors import ConfigError
from ..subject import are_pairs, check_length, check_pads, check_reads_text, open_tokenizer, tokenise


class Texts:
    """Texts or pairs of texts, and the tokenizer that the model reads them with."""

    def __init__(self, model, texts, tokenizer, max_length):
        check_reads_text(model)
        pairs = are_pairs(texts)
        if isinstance(tokenizer, (str, Path)):
            tokenizer = open_tokenizer(tokenizer)
        if tokenizer is None:
            raise ConfigError("A model in memory needs its tokenizer: report(model, texts, tokenizer=tokenizer).")
        self.model, self.texts, self.tokenizer = model, list(texts), check_pads(tokenizer)
        self.max_length = check_length(max_length, model, tokenizer, pairs)
        self.timed = tokenise(tokenizer, self.texts[:BATCH], pairs, self.max_length)

    def depths(self):
        """Batch by batch `(TokenDepths, samples)`, right after the model has run."""
        return text_depths(self.model, self.texts, self.tokenizer, self.max_length)

    def batch(self):
        """The first texts as a batch to time."""
        return dict(DataCollatorWithPadding(self.tokenizer)(self.timed).to(self.model.device))


class Images:
    """Images, and the processor that makes pixels of them."""

    max_length = None

    def __init__(self, model, images, processor):
        if not len(images) or any(isinstance(image, (str, tuple, list)) for image in images):
            raise ConfigError(f"{type(model).__name__} reads images: pass a list of PIL images (on the command line --images).")
        if isinstance(processor, (str, Path)):
            processor = _open_processor(processor)
        if processor is None:
            raise ConfigError("A model in memory needs its image processor: report(model, images, processor=processor).")
        self.model, self.images, self.processor = model, list(images), processor
        self.timed = self.images[:BATCH]

    def depths(self):
        """As `Texts.depths`."""
        return image_depths(self.model, self.images, self.processor)

    def batch(self):
        """The first images as a batch to time."""
        return dict(self.processor(self.timed, return_tensors="pt").to(self.model.device))


def _open_processor(folder):
    try:
        return AutoImageProcessor.from_pretrained(folder)
    except Exception as error:  # transformers, json and PIL each raise their own
        raise ConfigError(
            f"{folder} has no image processor. Save the model's own beside it: processor.save_pretrained({str(folder)!r}). ({error})"
        ) from error
