"""The demo dialogue set: everyday messages, and sixteen ways to answer each.

It knows texts only: no model, no tokenizer, no training. Every intent has a few phrasings of the user's message and, for
a formal and a casual voice, a core sentence, an extra sentence and a question back. An answer is chosen along four
switches (long, casual, emoji, question), so there is something to like and something to dislike, and what people like
can be read off a text.

Run: ``python -m learning.demo`` prints a few pairs.
"""

import random
from dataclasses import dataclass
from itertools import product

HELD_OUT_PHRASINGS = 2  # the last phrasings of each intent: never said by simulated users, only asked in evaluation


@dataclass(frozen=True)
class Voice:
    """One tone of voice for one intent: three sentences that can be put together."""

    core: str
    extra: str
    question: str


@dataclass(frozen=True)
class Intent:
    """What a user may want, in several phrasings, with a formal and a casual voice to answer in."""

    name: str
    phrasings: tuple[str, ...]
    formal: Voice
    casual: Voice
    emoji: str


@dataclass(frozen=True)
class Style:
    """The four switches of an answer."""

    long: bool
    casual: bool
    emoji: bool
    question: bool


STYLES = tuple(Style(*switches) for switches in product((False, True), repeat=4))


def answer(intent: Intent, style: Style) -> str:
    """The one text that `intent` is answered with in `style`."""
    voice = intent.casual if style.casual else intent.formal
    parts = [voice.core]
    if style.long:
        parts.append(voice.extra)
    if style.question:
        parts.append(voice.question)
    if style.emoji:
        parts.append(intent.emoji)
    return " ".join(parts)


def answers(intent: Intent) -> set[str]:
    """All sixteen valid answers to `intent`."""
    return {answer(intent, style) for style in STYLES}


def prompts(held_out: bool) -> list[tuple[str, Intent]]:
    """Phrasings with their intent: those that simulated users say, or those kept for evaluation."""
    cut = slice(-HELD_OUT_PHRASINGS, None) if held_out else slice(None, -HELD_OUT_PHRASINGS)
    return [(phrasing, intent) for intent in INTENTS for phrasing in intent.phrasings[cut]]


def dialogues(count: int, seed: int) -> list[list[dict[str, str]]]:
    """`count` conversations in the openai `messages` form, each ending with an assistant's answer.

    About an eighth carry an earlier exchange and a tenth a system message, so that the policy also copes with history, a
    persona and remembered lines.
    """
    rng = random.Random(seed)

    def exchange() -> list[dict[str, str]]:
        intent = rng.choice(INTENTS)
        said = _as_typed(rng.choice(intent.phrasings), rng)
        return [
            {"role": "user", "content": said},
            {"role": "assistant", "content": answer(intent, rng.choice(STYLES))},
        ]

    found = []
    for _ in range(count):
        messages: list[dict[str, str]] = []
        if rng.random() < 0.10:
            remembered = rng.choice(INTENTS)
            line = rng.choice(["You are kibitz.", f"Said earlier: {rng.choice(remembered.phrasings)}"])
            messages.append({"role": "system", "content": line})
        for _ in range(rng.choices((1, 2), weights=(88, 12))[0]):
            messages += exchange()
        found.append(messages)
    return found


def _as_typed(text: str, rng: random.Random) -> str:
    """People drop capitals and full stops."""
    if rng.random() < 0.25:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.15:
        text = text.rstrip("?!.")
    return text


def _intents() -> tuple[Intent, ...]:
    found = []
    for block in _TABLE.strip().split("\n\n"):
        name, phrasings, formal, casual, emoji = block.split("\n")
        found.append(
            Intent(
                name=name,
                phrasings=tuple(phrasings.split(" | ")),
                formal=Voice(*formal.split(" | ")),
                casual=Voice(*casual.split(" | ")),
                emoji=emoji,
            )
        )
    return tuple(found)


# Five lines an intent: its name; what users say; the formal and the casual voice (core | extra | question); an emoji.
_TABLE = """
greeting
hello | hi there | good morning | hey kibitz | hello, are you there? | good evening | hi, nice to meet you
Good day to you. | It is a pleasure to speak with you. | How may I help you?
Hey there! | Great to see you around. | What's up?
👋

thanks
thank you | thanks a lot | that helped, thanks | many thanks | thank you so much | cheers, thanks | thanks for your help
You are most welcome. | I am glad that I could be of help. | May I help with anything else?
No problem! | Always happy to lend a hand. | Need anything else?
🙏

goodbye
goodbye | bye for now | see you later | i have to go | talk to you tomorrow | good night | i am off, bye
Goodbye, and take care. | It was a pleasure to talk with you. | Shall we talk again soon?
See you! | That was fun, come back soon. | Chat again soon?
🌙

coffee
how do i make good coffee? | any coffee tips? | my coffee tastes bitter | how should i brew coffee? | i want better coffee | what makes a good coffee? | help me make coffee
Please use freshly ground beans. | Water just below boiling keeps the taste from turning bitter. | Do you own a grinder?
Grind your beans fresh! | Let the water cool a bit so it won't get bitter. | Got a grinder?
☕

dinner
what should i cook tonight? | any dinner ideas? | what is for dinner? | i need a quick dinner | i do not know what to cook | give me an idea for dinner | what could i eat tonight?
I suggest a vegetable curry. | It takes half an hour and keeps well until tomorrow. | Do you enjoy spicy food?
Go for a veggie curry! | Takes half an hour and it's even better tomorrow. | You into spicy stuff?
🍛

breakfast
what is a good breakfast? | breakfast ideas? | what should i eat in the morning? | i skip breakfast too often | what can i have for breakfast? | any quick breakfast? | tell me a good breakfast
Porridge with fruit is a fine choice. | It is quick to prepare and keeps you full until noon. | Do you have time in the morning?
Try oats with fruit! | Super quick and you won't be hungry till lunch. | Got time in the morning?
🥣

sleep
i can't sleep | how do i sleep better? | i am awake every night | any tips for sleeping? | i sleep badly | i am tired but can't sleep | help me fall asleep
Please keep a regular bedtime. | A dark, cool room without a screen also helps. | When do you usually go to bed?
Stick to one bedtime! | Keep it dark and ditch the phone. | When do you hit the sack?
😴

exercise
how do i get fit? | how should i start exercising? | i want to work out | any workout tips? | i need more exercise | how can i get in shape? | help me get fit
Begin with a daily walk. | Half an hour a day makes a great difference within weeks. | Do you prefer company?
Start with a daily walk! | Half an hour a day works wonders. | Wanna bring a friend?
🏃

weather
what is the weather like? | will it rain today? | is it cold outside? | do i need an umbrella? | how is the weather? | what about the weather tomorrow? | should i take a coat?
I cannot see the forecast. | Carrying a light jacket is seldom a mistake. | Where are you at the moment?
No clue, I can't see outside! | A light jacket never hurts. | Where are you at?
🌦️

joke
tell me a joke | make me laugh | do you know a joke? | say something funny | i need a laugh | got a joke for me? | tell me something funny
Why did the scarecrow win a prize? He was outstanding in his field. | I must admit that it is an old one. | Would you care for another?
What do you call a fake noodle? An impasta! | Yeah, it's a classic. | Want one more?
😂

music
what music should i listen to? | recommend some music | i need a new song | any good bands? | what should i play? | suggest some music | i am looking for music
I recommend a little jazz. | It suits both quiet work and a long evening. | Which artist do you admire?
Put on some jazz! | Fits work and chilling just the same. | Who's your favourite?
🎵

movie
what movie should i watch? | recommend a film | any good movies? | i want to see a film tonight | what is worth watching? | suggest a movie | i am bored, which film?
A classic mystery would be my choice. | The pleasure of guessing lasts until the final scene. | Do you like older films?
Grab a good mystery! | You'll be guessing till the very end. | You into old movies?
🎬

book
what should i read? | recommend a book | any good books? | i need a new novel | suggest something to read | which book do you like? | i am looking for a book
A short story collection is a fine start. | One story fits into any evening. | Which author do you enjoy?
Pick up some short stories! | One a night and you're done. | Got a favourite writer?
📚

travel
where should i travel? | any holiday ideas? | i want to go on a trip | where to go in summer? | suggest a place to visit | i need a vacation | help me plan a trip
A town by the sea is a lovely choice. | Trains make the journey part of the pleasure. | How many days do you have?
Hit a town by the sea! | Take the train and enjoy the ride. | How long you got?
🏖️

study
how do i study better? | i have an exam soon | study tips please | i can't focus on my homework | how should i learn for a test? | help me study | i keep forgetting what i learn
Study in short sessions with breaks. | Explaining a topic aloud shows what you truly know. | When is your examination?
Short sessions, lots of breaks! | Explain it out loud and it'll stick. | When's the test?
📝

work
i have too much work | work is stressful | my job is hard today | i am behind at work | how do i handle my workload? | there is too much to do | i feel overwhelmed at work
Choose the three tasks that matter most. | The remaining ones can usually wait until tomorrow. | Which one worries you?
Pick your top three things! | The rest can totally wait. | Which one bugs you most?
💼

interview
i have a job interview | how do i prepare for an interview? | interview tips please | i am nervous about my interview | my interview is tomorrow | help me with a job interview | what do i say in an interview?
Prepare two stories about your work. | Good questions of your own leave a strong impression. | Which position is it?
Have two work stories ready! | Ask stuff too, they love that. | What's the job?
👔

sad
i feel sad | i had a bad day | i am feeling down | everything is awful | i am not happy today | today was terrible | i feel low
I am sorry to hear that. | A quiet walk or a talk with a friend may ease it. | Would you like to tell me more?
Aw, that stinks! | A walk or a call with a pal might help. | Wanna talk about it?
💙

happy
i am so happy | i got good news | today was great | i feel wonderful | what a great day | i am in a good mood | something good happened
That is wonderful to hear. | Such days deserve to be remembered. | What made it so good?
Woohoo, love that! | Days like that are gold. | What happened?
🎉

birthday
it is my birthday | today is my birthday | my friend has a birthday | what to do for a birthday? | i turn thirty today | birthday ideas please | it is my sister's birthday
Many happy returns of the day. | A small cake and good company make it special. | How will you celebrate?
Happy birthday vibes! | Cake plus friends and you're set. | What's the plan?
🎂

cat
my cat ignores me | i got a cat | tell me about cats | my cat is hungry all day | why does my cat meow? | i love my cat | what do cats like?
Cats appreciate a calm routine. | Ten minutes of play each evening does wonders. | What is your cat called?
Cats love their routine! | Ten minutes of play and they're yours. | What's kitty's name?
🐱

dog
i got a dog | my dog barks a lot | how do i train my dog? | tell me about dogs | my dog pulls on the leash | my puppy bites | any dog tips?
Reward good behaviour at once. | Short daily training works better than long lessons. | How old is your dog?
Treats for good stuff, right away! | A few minutes a day is plenty. | How old's the pup?
🐶

garden
how do i start a garden? | my plants are dying | gardening tips please | what should i plant? | how often do i water plants? | i want to grow vegetables | help with my garden
Begin with herbs in a sunny spot. | Water them in the morning when the soil feels dry. | Do you have a balcony?
Start with herbs in the sun! | Water in the morning if the soil's dry. | Got a balcony?
🌱

money
how do i save money? | i spend too much | money tips please | i am always broke | help me with a budget | how can i spend less? | i want to save more
Set a small sum aside each payday. | A written budget shows where the rest goes. | Are you saving for something?
Stash a bit every payday! | Write it down and see where it goes. | Saving for something?
💰

computer
my computer is slow | my laptop crashed | computer help please | my screen froze | why is my pc so slow? | my computer will not start | fix my laptop
Please restart it first. | Many faults disappear once old programs are closed. | When did it begin?
Turn it off and on again! | Closing old stuff fixes a lot. | When did it start?
💻

coding
how do i learn to code? | i want to learn python | programming tips please | should i learn programming? | my code does not work | teach me coding | where do i start with coding?
Build something small that you need. | Reading error messages slowly is half of the craft. | What would you like to build?
Build something tiny first! | Read the errors slowly, they help. | What ya wanna build?
🐍

name
what is your name? | who are you? | what should i call you? | are you a bot? | tell me about yourself | who am i talking to? | are you human?
I am kibitz, a small chatbot. | I learn from the reactions that people give me. | And what is your name?
I'm kibitz, a tiny bot! | I learn from your thumbs up and down. | And you are?
🤖

bored
i am bored | what should i do now? | i have nothing to do | entertain me | give me an idea for the weekend | there is nothing going on | what can i do today?
You might visit a museum. | Many of them are free in the late afternoon. | Do you prefer to stay in?
Go check out a museum! | Lots are free later in the day. | Or you wanna stay in?
🎨
"""

INTENTS = _intents()


if __name__ == "__main__":
    for conversation in dialogues(8, seed=0):
        print(*(f"{message['role']}: {message['content']}" for message in conversation), sep="\n", end="\n\n")
