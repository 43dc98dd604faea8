"""Ordinary instruction and answer words, each one token to the tiny base whether its pre-training uses it or not."""

_TEXT = """
A B C D E F G H I J K L M N O P Q R S T U V W X Y Z 0 1 2 3 4 5 6 7 8 9 yes no true false none nothing
What Which Who Where When Why How Is Are Do Does Did Can Could Should Has Have Of The A In On At To From
Name Tell Give Pick Choose Count Read Write Caption Compose Describe Spell Identify Judge Decide Report List
Look Find Say State Answer Explain Compare Match Select Show Point Going Printed Measure Estimate Follow Repeat
Please From Show Decode Seek Sample Feel charted charting listed listing end start begin
what which who whose where when why how is are was were be been being do does did can could should would will
has have had the a an of in on at to from by with without for and or not but than as if whether while there here
this that these those it its they them their he she his her you your me my we our us one two three four five six
seven eight nine ten many much few more most less least some any all both each every either neither only other
another same different equal alike identical match matches matching twins similar unlike like
read write count name tell give pick choose spell identify judge decide describe describing compose caption
captions answer question answers word words sentence sentences phrase letter letters digit digits number numbers
sign signs symbol symbols text printed print written handwritten handwriting hand somebody scan scans page label
labels labelled title character chart charts bar bars graph plot plots plotted curve curves line lines axis value
values figure figures diagram table icon icons picture pictures photo photos image images scene object objects
thing things shape shapes form forms dot dots spot spots point points mark marks item items colour colours color
paint painted dark bright pale red green blue yellow purple orange black white grey brown pink
circle circles square squares triangle triangles diamond diamonds ring rings cross crosses star saltire bowl box
small smaller smallest large larger largest big bigger biggest tiny medium huge tall taller tallest short shorter
shortest long longer longest high higher highest low lower lowest wide narrow thick thin near far close
first second third last next before after between above below under over beside inside outside left right top
bottom middle centre corner edge side up down upwards downwards towards away along across rise rises rising fall
falls falling climb climbs climbing drop grow grows growing shrink increase decrease flat steep straight bent
come comes go goes going went make makes take takes see seen show shown shows look looks appear appears stand
stands sit sits lie lies hold holds contain contains belong lead leads turn turns meet meets touch touches
cross crossing open closed empty full new old good bad true best worst correct wrong exact exactly about
please now just very really also then so too again ever never always often maybe together alone
short brief briefly single one-word complete simple clear careful carefully
man woman child dog cat horse bird car bus train boat street house tree water sky field road room door window
hat shirt dress ball bike table chair cup plate food bread apple hill river sun snow beach grass wall
person people boy girl player runner rider crowd group pair team couple kid baby play plays playing run runs
running walk walks walking sitting standing holding wearing riding jumping eating smiling
kind type sort class category option options true correct part parts whole half total sum amount size sizes
place places position order row rows column columns level height length width depth angle area
plain striped ruled slanted checked speckled north northeast east southeast south southwest west northwest
dominant slightest outline everything upper central
"""

WORDS: tuple[str, ...] = tuple(dict.fromkeys(_TEXT.split()))
