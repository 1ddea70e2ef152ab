"""Activation addition on any causal network: the pairs of Turner et al. 2023 (table 1), your prompts, a classifier or an Inspect model as judge.

    python papers/actadd.py --model gpt2-xl --prompts stanfordnlp/imdb --sentiment-judge PATH \\
        --toxic-prompts allenai/real-toxicity-prompts --toxicity-judge PATH

Without a judge the sentiment and toxicity experiments are left out, and said to be; the wedding words need none. Nothing here is a result.
"""

from __future__ import annotations

import argparse

from actadd_arms import Experiment

from glasshouse.evals import insults, sentiment, topic
from glasshouse.evals.continuations import BROKEN, Continuation

WEDDING = ("wedding", "weddings", "wed", "marry", "married", "marriage", "bride", "groom", "honeymoon")
OPENINGS = (
    "I went up to my friend and said", "I'm excited because I'm going to a", "On Saturday morning we all got up and",
    "The first thing she told me was that", "When I opened the letter I saw that", "My brother called last night to say",
    "We had been planning this for months and", "At the end of the long road there", "The teacher looked at the class and said",
    "If you ask me what I remember, it is", "In the middle of the town there was", "He put down the newspaper and asked",
    "After dinner they walked outside and", "It had been raining all week, so we", "Nobody in the office knew why the",
    "The most important thing in life is",
)  # fmt: skip


def real_experiments(given: argparse.Namespace) -> list[Experiment]:
    """The paper's experiments for which prompts and judges were given."""
    made = [Experiment("topic: weddings", weddings(given), " weddings", " ", "", {"unsteered": 0.02, "steered": 0.9}, WEDDING, dose=True)]
    if given.sentiment_judge and given.prompts:
        told = {"n": given.n, "prompts": given.prompts, "judge": given.sentiment_judge}
        labelled = "imdb" in given.prompts.lower()
        bad = sentiment.SentimentOptions(target="positive", opening="negative" if labelled else "neutral", **told)
        good = sentiment.SentimentOptions(target="negative", opening="positive" if labelled else "neutral", **told)
        made += [
            Experiment("sentiment: negative to positive", sentiment.continuation(bad), "Love", "Hate", opening="", published={"steered": 0.669}),
            Experiment("sentiment: positive to negative", sentiment.continuation(good), "Hate", "Love", opening="", published={"steered": 0.432}),
        ]
    else:
        print("sentiment: left out; it needs --prompts and --sentiment-judge")
    if given.toxicity_judge and given.toxic_prompts:
        options = insults.InsultOptions(count="clean", n=given.n, prompts=given.toxic_prompts, judge=given.toxicity_judge)
        published = {"unsteered": 0.866, "steered": 0.888}
        made.append(Experiment("detoxification: clean", insults.continuation(options), "Love", "Hate", opening="", published=published))
    else:
        print("detoxification: left out; it needs --toxic-prompts and --toxicity-judge")
    return made


def weddings(given: argparse.Namespace) -> Continuation:
    """The nine wedding words, after your prompts or after sixteen neutral openings."""
    if given.prompts:
        return topic.continuation(topic.TopicOptions(words=",".join(WEDDING), prompts=given.prompts, n=given.n))
    classes = ("on_topic", "off_topic", BROKEN)
    return Continuation("on_topic_weddings", OPENINGS, lambda prompt, text: topic.grade(prompt, text, WEDDING), ("on_topic",), classes)
