"""How the model is told to answer: an instruction behind the question, by the kind of its answer.

`prepare` writes it into the sample, so training, evaluation, export and the probes of serving see one text.
"""

from dataclasses import replace

from vismem.config import InstructionsConfig
from vismem.data.answer_forms import AnswerKind, answer_form
from vismem.data.sample import Sample, option_lines


def instructed(sample: Sample, instructions: InstructionsConfig) -> Sample:
    """The sample with the instruction for its kind of answer, each on a line of its own; as it is where there is none.

    Options that the question does not show come before it, under their letters.
    """
    form = answer_form(sample.question, sample.answer, sample.choices)
    instruction = instruction_for(form.kind, instructions)
    if not instruction:
        return sample
    letters_only = [*form.options] == [option.upper() for option in form.options.values()]
    unseen = {} if form.shown or form.polar or letters_only else form.options
    return replace(sample, question="\n".join((sample.question, *option_lines(unseen), instruction)))


def instruction_for(kind: AnswerKind, instructions: InstructionsConfig) -> str:
    """The instruction for a kind of answer; empty where there is none."""
    return {
        AnswerKind.CHOICE: instructions.choice,
        AnswerKind.LETTERS: instructions.letters,
        AnswerKind.YES_NO: instructions.yes_no,
        AnswerKind.NUMBER: instructions.number,
        AnswerKind.TEXT: instructions.text,
    }[kind]
