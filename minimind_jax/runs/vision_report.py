"""What a model that sees says of held-out pictures, before its run and after: results.md, and the pictures it shows."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import jax

from minimind_jax.config.stages import RunConfig
from minimind_jax.data.batches import Batches
from minimind_jax.data.jsonl import Record, expand_paths, iter_lines, parse_line, tell
from minimind_jax.errors import UserError
from minimind_jax.evaluate.images import Answers, Asker, ImageResult, PixelFile, shuffled
from minimind_jax.evaluate.share import Share
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.runs.parts import Run, start_params
from minimind_jax.seeds import named_seed
from minimind_jax.texts import cell, table
from minimind_jax.training.run import RunFolder, write_text

ASKED = 100  # held-out records at most, the first ones
SHOWN = 8  # of them, with their pictures
SIDE = 112  # pixels of a picture in the report
CHARACTERS = 200  # of a text beside it
MAX_NEW_TOKENS = 48


def judge_seeing(run: Run, held_out: Batches) -> None:
    """Asks the model that the run has written, and the one that it started from, and writes what they say."""
    ask = Asker.load(str(run.folder.path), MAX_NEW_TOKENS, batch_size=16)
    numbers = sorted(held_out.cache.records[held_out.epoch(0).documents].tolist())[:ASKED]
    told: Counter = Counter()
    bad: list[UserError] = []  # that end in a question, a call or a thought, or whose pictures are gone by now
    questions = ask.questions(_records(run.config, numbers), run.config.data, told, bad.append)
    tell(told)
    if bad:
        print(f"held-out records that are not asked: {len(bad):,}, the first: {bad[0]}")
    if not questions:
        return
    if run.config.data.empty_think_removal == 1:
        print(
            "held-out pictures are asked about behind an empty thought, as in chats, and this run has learned without "
            "(data.empty_think_removal 1); its answers may be worse than what it sees"
        )
    pictures = [question.pictures for question in questions]
    others = shuffled(pictures, named_seed(run.config.seed, "shuffled pictures"))
    after, guessed = ask(questions, pictures), others and ask(questions, others)
    start = LanguageModel(run.model.config, run.config.compute)
    params = jax.device_put(start_params(run))
    ask_before = Asker(start, params, run.tokenizer, MAX_NEW_TOKENS, batch_size=16)
    ask_before.pictures = ask.pictures
    before = ask_before(questions, pictures)
    result = ImageResult("answers", questions, after, guessed)
    write_text(
        run.folder.results_file, f"{_figures(result, before)}\n\n{_shown(run.folder, result, before, ask.pictures)}\n"
    )
    print(f"held-out pictures: {Share.of(result.exact(after)).describe()} answered as in the data")


def _records(config: RunConfig, numbers: Sequence[int]) -> Iterator[Record]:
    """Those of the files that the held-out ones are of, by their numbers in them."""
    files = expand_paths(config.data.val or config.data.train)
    lines = ((file, line, raw) for file in files for line, raw in iter_lines(file, config.data))
    wanted, told = {*numbers}, Counter()
    for number, (file, line, raw) in enumerate(itertools.islice(lines, max(numbers) + 1)):
        if number in wanted:
            yield parse_line(raw, file, line, told)


def _figures(result: ImageResult, before: Answers) -> str:
    asked = len(result.questions)
    columns = {"before": before, "after": result.own, "after, pictures shuffled": result.shuffled}
    columns = {name: answers for name, answers in columns.items() if answers is not None}
    exact = [Share.of(result.exact(answers)).describe() for answers in columns.values()]
    bits = [f"{result.bits_per_byte(answers):.4f}" for answers in columns.values()]
    rows = ("the same answer", *exact), ("bits per byte of theirs", *bits)
    return (
        f"{asked:,} held-out records were asked for their last answer anew, which is compared with theirs (in "
        f"brackets the interval of 95 %).\n\n{table(('', *columns), rows)}"
    )


def _shown(folder: RunFolder, result: ImageResult, before: Answers, pictures: PixelFile) -> str:
    """A table of some questions with their pictures, which are written beside the report."""
    from PIL import Image  # imported here: it is an extra

    chosen = {question.pictures[0]: n for n, question in reversed([*enumerate(result.questions)])}
    folder.pictures.mkdir(exist_ok=True)
    rows = []
    for n in sorted(chosen.values())[:SHOWN]:
        question = result.questions[n]
        file = folder.pictures / f"{n + 1}.png"
        Image.fromarray(pictures.picture(question.pictures[0]).pixels).resize((SIDE, SIDE)).save(file)
        said = question.asked, question.answers[0], before.texts[n], result.own.texts[n]
        rows.append([f"![]({file.parent.name}/{file.name})", *(cell(text[:CHARACTERS]) for text in said)])
    return table(("picture", "asked", "answer", "before", "after"), rows)
