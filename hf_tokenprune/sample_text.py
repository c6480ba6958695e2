"""English text to measure on when none is given."""

import re

PROSE = """
The ferry to the outer islands leaves twice a day in summer and once a day from October. Tickets are sold on the pier.
Bicycles travel free, but anything with an engine must be booked a week ahead, since the deck only has room for nine
cars. When the wind is above seven the crossing is cancelled and passengers are put up in the old customs house. Nobody
seems to mind.

Our order arrived on Tuesday instead of Friday, which was a pleasant surprise. Two of the six chairs had scratched legs.
I sent photographs to the shop the same evening and got an answer within the hour. They offered either a refund of
thirty percent or a pair of new chairs, and let us keep the scratched ones in both cases, so we now have eight chairs
and a very good opinion of the company. Would buy again!

Vitamin D is made in the skin under sunlight and is also taken up from food such as oily fish and egg yolk. North of
about forty degrees there is too little light from November to March. People who work indoors, cover their skin or are
over seventy are most likely to have too little of it. A daily supplement of ten micrograms is considered safe for
adults. Higher doses should be discussed with a doctor, because an excess raises the level of calcium in the blood and
can, over months, damage the kidneys.

The committee met at nine. It approved the minutes of the previous meeting without changes and turned to the budget for
the coming year. Mrs Okafor explained that the cost of heating had doubled since the boiler was last serviced and asked
for a survey. After a short discussion the members voted five to two in favour, on the condition that three firms are
asked for an offer. The next meeting is on the twelfth of May.

How do I remove a file from the last commit without losing my local changes? I pushed nothing yet. You can reset softly
to the commit before, take the file out of the index, and commit again with the same message. The working tree is not
touched by any of these steps, so your edits stay where they are. If the commit was already pushed, the history of
everyone who pulled it will differ from yours after this, and it is kinder to add a second commit that deletes the file.

The home side took the lead after four minutes through a header from a corner. It was their first goal in five matches.
The visitors had most of the ball for the rest of the half but found no way through, and their only shot on target was a
free kick from thirty metres that the keeper held without trouble. A penalty decided it. With the defeat they drop to
fourteenth place, two points above the relegation zone, with six games left to play.

Melt the butter slowly and let it cool while you beat the eggs with the sugar. The mixture should be pale and thick
enough to leave a trail. Fold in the flour in three portions, then the butter, and stop as soon as no streaks are left.
Bake for twenty-five minutes. The cake sinks a little when it cools, which is as it should be; dust it with icing sugar
and serve it with sour cherries or, in winter, with stewed pears.

Prices of copper fell for a third week as stocks in the warehouses of the exchange reached their highest level in years.
Analysts had expected a recovery. Demand from builders remains weak, and several smelters have postponed the maintenance
that usually takes capacity out of the market in spring. A strike at one of the largest mines ended on Sunday. Futures
for delivery in three months were little changed on Monday.

The lighthouse was built in 1871 from granite that was quarried on the spot. Its keeper lived there with his family
until the lamp was automated. Visitors may climb the one hundred and ninety-six steps to the gallery, from which on a
clear day the coast can be seen as far as the cape. Children under six are not admitted. Bring a jacket.

This film has no idea what it wants to be. It opens as a comedy about two brothers who inherit a failing vineyard, turns
into a thriller about halfway through, and ends with a speech about forgiveness that nothing before has prepared. The
actors do what they can. Only the photography, all low sun and long shadows, is worth the price of the ticket. I looked
at my watch four times.

A heat pump moves heat from a cold place to a warm one with the help of a fluid that evaporates and condenses. It needs
about a third of the energy that it delivers. The smaller the difference in temperature, the better it works, so a house
with large radiators or heated floors is a better place for it than one that needs very hot water. Insulation comes
first. The outdoor unit makes some noise and should not stand under a bedroom window.

Dear neighbours, the water will be turned off on Thursday between eight and noon. The valve in the cellar has to be
replaced. Please fill a bucket or two beforehand, and do not start a washing machine that would still be running at
eight. If you see brown water afterwards, let the cold tap run for a few minutes until it is clear. Thank you for your
patience, and call the office if anything is still not as it should be in the afternoon.
"""
_paragraphs = [re.split(r"(?<=[.?!])\s+", paragraph.strip()) for paragraph in PROSE.split("\n\n")]
TEXTS = tuple(
    " ".join(sentences[start:end]).replace("\n", " ")
    for sentences in _paragraphs
    for start in range(len(sentences))
    for end in range(start + 1, len(sentences) + 1)
)
"""180 texts of 3 to 94 words: every run of neighbouring sentences of every paragraph."""
