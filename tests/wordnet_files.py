"""Nineteen synsets by hand in WordNet's own file format. Knows no expected values."""
# ruff: noqa: E501 -- one synset is one line of the format

from pathlib import Path

# offset lex_filenum ss_type w_cnt(hex) (word lex_id)... p_cnt (symbol offset pos src/tgt)... | gloss
DATA = """\
  1 This software and database is being provided to you, the LICENSEE, by
  2 nobody: it is a fixture.
00000100 03 n 01 entity 0 001 ~ 00000200 n 0000 | that which is perceived to have its own existence
00000200 05 n 02 animal 0 creature 0 003 @ 00000100 n 0000 ~ 00000300 n 0000 ~ 00000400 n 0000 | a living organism that can move
00000300 05 n 01 bird 0 002 @ 00000200 n 0000 #m 00001900 n 0000 | warm-blooded vertebrate with feathers and wings
00000400 05 n 02 fish 0 Pisces 1 001 @ 00000200 n 0000 | vertebrate that lives in water and has gills; "the shark is a large fish"
00000500 05 n 02 hen 0 biddy 0 002 @ 00000300 n 0000 + 00001111 v 0101 | adult female chicken kept for eggs; "she feeds the hens"
00000600 05 n 01 parrot 0 001 @ 00000300 n 0000 | usually brightly colored zygodactyl with a hooked beak
00000700 05 n 02 sparrow 0 hedge_sparrow 0 001 @ 00000300 n 0000 | any of several small dull-colored singers feeding on seeds
00000800 05 n 02 dunnock 0 hedge_sparrow 1 001 @ 00000300 n 0000 | small brownish European songster
00000900 05 n 01 owl 0 001 @ 00000300 n 0000 | nocturnal hunter with a hawk-like beak; an owl sees well
00001000 05 n 01 salmon 0 001 @ 00000400 n 0000 | large food swimmer of northern waters that spawns in rivers
00001100 05 n 01 trout 0 001 @ 00000400 n 0000 | speckled game swimmer of cool fresh water
00001200 05 n 01 eel 0 001 @ 00000400 n 0000 | voracious snakelike swimmer with a smooth slimy skin
00001300 06 n 01 tool 0 001 @ 00000100 n 0000 | an implement used in the practice of a vocation
00001400 06 n 01 hammer 0 001 @ 00001300 n 0000 | a heavy head on a handle for driving nails
00001500 06 n 01 saw 0 002 @ 00001300 n 0000 %p 00001800 n 0000 | a toothed blade for cutting wood
00001600 06 n 01 file 0 001 @ 00001300 n 0000 | steel with rough surfaces for smoothing metal
00001700 05 n 01 Tweety 0 001 @i 00000300 n 0000 | a yellow canary of the cartoons
00001800 06 n 01 tooth 3 002 @ 00001300 n 0000 #p 00001500 n 0000 | something resembling the biting part of a mouth
00001900 05 n 01 flock 0 002 @ 00000200 n 0000 %m 00000300 n 0000 | a group of sheep or goats or of those with wings
"""
# lemma pos synset_cnt p_cnt [symbol]... sense_cnt tagsense_cnt synset_offset...
INDEX = """\
  1 This software and database is being provided to you, the LICENSEE, by
animal n 1 2 @ ~ 1 1 00000200
biddy n 1 1 @ 1 0 00000500
bird n 1 3 @ ~ #m 1 1 00000300
creature n 1 2 @ ~ 1 1 00000200
dunnock n 1 1 @ 1 1 00000800
eel n 1 1 @ 1 1 00001200
entity n 1 1 ~ 1 1 00000100
file n 1 1 @ 1 1 00001600
fish n 1 1 @ 1 1 00000400
flock n 1 2 @ %m 1 1 00001900
hammer n 1 1 @ 1 1 00001400
hedge_sparrow n 2 1 @ 2 1 00000700 00000800
hen n 1 1 @ 1 1 00000500
owl n 1 1 @ 1 1 00000900
parrot n 1 1 @ 1 0 00000600
pisces n 1 1 @ 1 0 00000400
salmon n 1 1 @ 1 1 00001000
saw n 1 2 @ %p 1 1 00001500
sparrow n 1 1 @ 1 1 00000700
tool n 1 1 @ 1 1 00001300
tooth n 1 2 @ #p 1 1 00001800
trout n 1 1 @ 1 1 00001100
tweety n 1 1 @ 1 1 00001700
"""


def write_wordnet(folder: Path, *, data: str = DATA, index: str = INDEX) -> Path:
    """Write both files and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.noun").write_text(data, encoding="utf-8")
    (folder / "index.noun").write_text(index, encoding="utf-8")
    return folder
