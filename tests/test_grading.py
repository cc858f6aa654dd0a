"""Grading against lm-evaluation-harness's own steps written out, against a table read by hand, and by its properties."""
import random, re, time
from fractions import Fraction

import pytest
from hypothesis import given, settings, strategies as st

from gsm8k_sft.grading.answers import ENDS, GRADERS, extract_flexible, extract_numeric, final_number, grade, grader_versions, to_number
from gsm8k_sft.grading.arithmetic import annotations, calculate, equations, format_result, verdict
from gsm8k_sft.grading.errors import CLASSES, by_size, class_table, first_slip, grade_answer

FILTERS = {"strict": (r"#### (\-?[0-9\.\,]+)", 0), "flexible": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)}


def harness(text, gold, name):
    "RegexFilter, take_first, exact_match_hf_evaluate: what lm_eval 0.4 does to one response"
    pattern, select = FILTERS[name]
    match = re.findall(pattern, text)
    found = "[invalid]"
    if match:
        found = match[select]
        if isinstance(found, tuple): found = [m for m in found if m][0]
        found = found.strip()
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"): found, gold = re.sub(ignored, "", found), re.sub(ignored, "", gold)
    return found.lower() == gold.lower()


def test_as_the_harness_on_random_texts():
    rng, pieces = random.Random(0), ["#### ", "####", "18", "1,8", "$", ".", ",", "-", " ", "\n", "0", "eggs", "#", "\u0661", "18.00"]
    for _ in range(20_000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 8)))
        gold = rng.choice(["18", "-18", "1,800", "so it is\n#### 18", "#### 0", "step\n#### 1,8"])
        got = grade(text, gold)
        for name in FILTERS: assert got[name] == harness(text, gold, name), (text, gold, name)


def test_the_last_number_of_long_texts_is_the_harness_s():
    rng, pieces = random.Random(1), ["18", "$", ".", ",", "-", " ", "eggs", "a" * 300, "9" * 500, "1," * 400, "\n"]
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 40)))
        match = re.findall(FILTERS["flexible"][0], text)
        assert extract_flexible(text) == ([m for m in match[-1] if m][0].strip() if match else None)


# what is right: S strict, F flexible, N numeric. S and F are read off the two regular expressions by hand, N is what a reader would say
CASES = [
    ("#### 18", "18", "SFN"),
    ("She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18", "18", "SFN"),
    ("#### 18.", "18", "SFN"),
    ("#### 18.00", "18", "N"),                      # compared as text
    ("#### 018", "18", "N"),
    ("#### $18", "18", "FN"),
    ("#### €18", "18", "FN"),
    ("####18", "18", "FN"),
    ("####  18", "18", "FN"),                       # two spaces
    ("####\n18", "18", "FN"),
    ("#### +18", "18", "FN"),
    ("#### **18**", "18", "FN"),
    ("#### 18 eggs", "18", "SFN"),
    ("#### 18%", "18", "SFN"),
    ("#### 18<|im_end|>", "18", "SFN"),
    ("#### 1,080", "1080", "SFN"),
    ("#### 1080", "1,080", "SFN"),
    ("#### 1,080.00", "1080", "N"),
    ("#### 1.080", "1080", ""),                     # a full stop is no thousands separator
    ("#### 1 080", "1080", ""),                     # nor is a space
    ("#### 1,8", "18", "SF"),                       # no thousands: not a number
    ("#### 10,80", "1080", "SF"),
    ("#### 18 eggs (in 2 weeks)", "18", "SN"),      # the last number is the 2
    ("#### 18 in 2 weeks", "18", "SN"),
    ("#### 18 eggs, 9 of them sold", "18", "S"),
    ("#### 18 or 19", "18", "S"),
    ("#### 19 or 18", "18", "F"),
    ("#### 18 (or 19)", "18", "S"),
    ("#### 18, 19", "18", "S"),
    ("#### 18-19", "18", "S"),
    ("#### 18 and a half", "18", "SF"),
    ("#### 18.5", "18", ""),
    ("#### 18²", "18", "SF"),
    ("#### 18?", "18", "SF"),
    ("#### 18:00", "18", "S"),
    ("#### not 18", "18", "F"),
    ("#### 20 != 18", "18", "F"),
    ("#### 18 less than twenty", "18", "SF"),
    ("#### 18M", "18", "SF"),
    ("#### $ 18", "18", "FN"),
    ("It is false that the answer is 18.", "18", "F"),
    ("Answer: She has twice 18.", "18", "F"),
    ("#### -18", "-18", "SFN"),
    ("#### −18", "-18", "N"),                       # U+2212
    ("#### -$18", "-18", "FN"),
    ("#### - 18", "-18", ""),
    ("#### -18", "18", ""),
    ("#### 3/4", "0.75", "N"),
    ("#### 0.75", "3/4", "N"),
    (r"#### \frac{3}{4}", "0.75", "N"),
    ("#### 1 1/2", "1.5", "N"),
    ("#### 1½", "1.5", "N"),
    ("#### 1/0", "0", "F"),
    ("#### 1.8e1", "18", "N"),
    (r"#### 1.8 \times 10^{1}", "18", "N"),
    ("#### 25%", "25", "SFN"),
    ("#### 0.25", "25", ""),
    ("#### 25%", "0.25", ""),                       # a percent sign is a unit
    ("#### 10 + 8 = 18", "18", "FN"),
    ("#### 18\n#### 20", "18", "SN"),               # the first
    ("#### 20\n#### 18", "18", "F"),
    ("#### Plan\nAdd.\n#### 18", "18", "SFN"),      # a heading
    ("#### Answer: 18", "18", "FN"),
    ("#### 17\n\nQuestion: and now?\nAnswer: 9\n#### 18", "18", "F"),
    ("#### 17", "18", ""),
    ("####", "18", ""),
    ("", "18", ""),
    ("#### 18", "", ""),
    ("#### 18", "so it is\n#### 18", "SFN"),
    (r"\boxed{18}", "18", "FN"),
    (r"Hence $\boxed{\$18}$.", "18", "N"),          # flexible ends on `$.`
    (r"$\boxed{18\text{ eggs}}$", "18", "FN"),
    (r"\boxed{1{,}080}", "1080", "N"),
    (r"\boxed{17}, no: \boxed{18}", "18", "FN"),    # the last
    (r"\boxed{18}, no: \boxed{17}", "18", ""),
    (r"\boxed{18 \text{ or } 19}", "18", ""),
    (r"\boxed{18", "18", "F"),
    ("The answer is 18.", "18", "FN"),
    ("The answer is $18...", "18", "N"),
    ("The answer is 18 dollars per day.", "18", "FN"),
    ("The answer is:\n\n$$18$$", "18", "FN"),
    (r"The answer is \(\frac{36}{2}\).", "18", "N"),
    ("The answer is 18 because 20 - 2 = 18.", "18", "FN"),
    ("The answer is 17. Wait. The answer is 18.", "18", "FN"),
    ("The answer is 18. No, the answer is 17.", "18", ""),
    ("The answer is not 18.", "18", "F"),
    ("The answer is between 18 and 20.", "18", ""),
    ("If the answer is 18, she is rich.", "18", "F"),
    ("The wrong answer is 18.", "18", "F"),
    ("Is the answer 18?", "18", "F"),
    ("The answer is 18 thousand.", "18", "F"),
    ("The answer is 18 thousand.", "18000", "N"),
    ("Final answer: 18", "18", "FN"),
    ("Answer: 18 dollars", "18", "FN"),
    ("**Answer:** $18", "18", "FN"),
    ("Answer: Janet makes $18 every day.", "18", "FN"),
    ("Answer: Janet has 9 eggs and makes 18 dollars.", "18", "F"),
    ("Answer: She has 18 eggs.\nShe eats some.", "18", "F"),
    ("Answer: 9 + 9 = 18 eggs\nThen 18 - 3", "18", ""),
    ("Answer: A) 18", "18", "F"),
    ("A: 18", "18", "FN"),
    ("A: 18\nB: 20", "18", ""),
    ('{"answer": 18}', "18", "FN"),
    ("18", "18", "FN"),
    ("$18.00 per day", "18", "N"),
    (" 18 eggs\nQuestion: what is 20?", "18", "N"),
    ("18\nAnswer: 20\nAnswer: 22", "18", "N"),
    ("20\nAnswer: 22\nAnswer: 18", "18", "F"),
    ("Question: 18", "18", "F"),
    ("18 plus nothing", "18", "F"),
    ("So 9 * 2 = 18", "18", "F"),                   # the end of an unfinished calculation
    ("She sells 9 eggs for $18", "18", "F"),
    ("There are 20 eggs.\n18 eggs are left", "18", "F"),
    ("Then 16 - 3 = 13, and 9 * 2 = 18, so", "18", "F"),
    ("eighteen", "18", ""),
]


def test_the_table_is_large_enough(): assert len(CASES) >= 60 and len({c[:2] for c in CASES}) == len(CASES)


@pytest.mark.parametrize("text,gold,right", CASES)
def test_by_hand(text, gold, right):
    got = grade(text, gold)
    assert "".join(k[0].upper() for k in ("strict", "flexible", "numeric") if got[k]) == right, got
    for name in FILTERS: assert got[name] == harness(text, gold, name)


# kinds of statements in the prose of instruct models, in our words: text, gold, is it right?
KINDS = {
    "mark inside a sentence": [
        ('First we fill it.\nso the tank holds #### 12 litres of water', '12', True),
        ('so the tank holds #### 12 litres of water.', '12', True),
        ('So the tank holds #### 12 litres of water to fill 3 jugs.', '12', True),
        ('He pays #### $104 for the boots and the belt.', '104', True),
        ('Thus she needs #### 5 boxes in order to pack all 40 books.', '5', True),
        ('It takes #### 3 hours. He arrives at 5.', '3', True),
        ('She has 12 + 6 = #### 18 eggs, so she can bake.', '18', True),
    ],
    "mark with equation": [
        ('#### 9 * 2 = 18', '18', True),
        ('#### x = 18', '18', True),
    ],
    "mark with words": [
        ('#### The answer is 18', '18', True),
        ('#### Answer: 18', '18', True),
        ('#### Total cost: $18', '18', True),
        ('#### Final Answer\n18', '18', True),
        ('#### Final Answer\n**$18**', '18', True),
    ],
    "mark, list": [
        ('#### - 18', '18', False),
    ],
    "last sentence": [
        ('The boots cost 130 * 0.8 = 104.\nTherefore the boots cost $104.', '104', True),
        ('Therefore the boots cost $104.', '104', True),
        ('So she pays $104 for the boots', '104', True),
        ('Thus, Tom has 12 apples left.', '12', True),
        ('In total, they read 45 pages.', '45', True),
        ('Step 1: 9 eggs.\nStep 2: 9 * 2 = 18.', '18', True),
    ],
    "last sentence, several": [
        ('16 - 3 - 4 = 9 and 9 * 2 = 18. So Janet makes $18 every day by selling 9 eggs at $2 each.', '18', True),
        ('Therefore, after selling 9 eggs at $2 each, Janet makes $18 per day.', '18', True),
        ('Therefore, in 4 weeks she will eat 7 dozen eggs.', '7', True),
        ('Therefore, the cost of 3 shirts is $45.', '45', True),
        ('So 12 of the 30 students are girls.', '12', True),
        ('48 / 12 = 4. Therefore, Tom needs 4 boxes to pack 48 eggs.', '4', True),
        ('Tom is 15 and Jane is 12.', '15', False),
        ('Tom is 15 and Jane is 12.', '12', False),
    ],
    "last sentence, bold": [
        ('Therefore, with 9 eggs at $2, Janet makes **$18** every day.', '18', True),
    ],
    "last sentence, closing": [
        ('Therefore, the boots cost $104. I hope this helps!', '104', True),
        ('Therefore, the boots cost $104.\n\nLet me know if you have any other questions.', '104', True),
        ('So he has 5 apples left. 😊', '5', True),
    ],
    "cents": [
        ('Therefore, the boots cost $104.00.', '104', True),
        ('#### $104.00', '104', True),
        ('#### 104.00 dollars', '104', True),
        ('She pays $18.50.', '18.5', True),
        ('She pays 18 dollars and 50 cents.', '18.5', True),
        ('#### $18 and 50 cents', '18.5', True),
        ('The answer is 18 dollars and 50 cents.', '18', False),
        ('#### $ 18.00', '18', True),
        ('#### 18.00$', '18', True),
        ('#### US$18', '18', True),
        ('The total is USD 18.', '18', True),
    ],
    "restated": [
        ('Problem: Tom has 3 apples and buys 2. How many has he?\nSolution: 3 + 2 = 5\n#### 5', '5', True),
        ('Question: Tom has 3 apples and buys 2. How many has he?\nAnswer: Tom has 3 + 2 = 5 apples.\n#### 5', '5', True),
        ('**Problem:** Tom has 3.\n\n**Solution:**\n3 + 2 = 5. Therefore he has 5.\n\n**Problem:** Ann has 7.\n**Solution:** 7', '5', True),
        ('**Problem:** Tom has 3.\n\n**Solution:**\n3 + 2 = 5. So he has 5.\n\n**Problem:** Ann: 7.\n**Solution:** 7\n#### 7', '7', False),
        ('Problem: Tom has 3 apples. How many are 3?', '3', False),
        ('Here is the question.\nQuestion: Tom has 3 apples and buys 2. How many?\nSolution: He has 5 apples.', '5', True),
    ],
    "units": [
        ('#### 5個', '5', True),
        ('#### 12元', '12', True),
        ('#### 5개', '5', True),
        ('#### 3 Äpfel', '3', True),
        ('#### 5 яблок', '5', True),
        ('所以她每天赚18元。', '18', True),
        ('答案：#### 18元', '18', True),
        ('#### 18。', '18', True),
        ('#### １８', '18', True),
        ('#### 12kg', '12', True),
        ('#### 12 km/h', '12', True),
        ('#### 12 m²', '12', True),
        ('#### 50%', '50', True),
        ('#### 12"', '12', True),
        ('#### 72°F', '72', True),
    ],
    "tags": [
        ('<answer>5</answer>', '5', True),
        ('He has 3 + 2 apples.\n<answer> 5 </answer>', '5', True),
        ('<think>3 + 2 = 5</think>\n<answer>\\boxed{5}</answer>', '5', True),
        ('<answer>5 or 6</answer>', '5', False),
        ('So we have **5**', '5', True),
        ('#### <b>5</b>', '5', True),
        ('#### $\\text{5 apples}$', '5', True),
        ('#### \\(5\\)', '5', True),
        ('#### [5]', '5', True),
        ('$$\\boxed{5}$$ apples', '5', True),
        ('\\[ \\boxed{5 \\text{ apples}} \\]', '5', True),
        ('### 5', '5', True),
        ('3 + 2 = 5\n\n**5**', '5', True),
        ('3 + 2 is five\n\n5', '5', True),
    ],
    "grouping": [
        ('#### 1.000,50', '1000.5', True),
        ('#### 1,000.50', '1000.5', True),
        ('#### 1.000', '1000', False),
        ('#### 1.000.000', '1000000', True),
        ('#### 1\u202f000', '1000', True),
        ('#### 1\xa0000 km', '1000', True),
        ('#### 1\u2009000', '1000', True),
        ('#### 1 8', '18', False),
        ('#### 12,34', '1234', False),
        ('#### 1,2', '12', False),
    ],
    "equation": [
        ('So x = 5.', '5', True),
        ('5 = x.', '5', True),
        ('So the total is = 5.', '5', True),
        ('Total = 18', '18', True),
        ('Total cost = 9 * 2 = $18', '18', True),
        ('x = 5 and y = 3.', '3', False),
        ('x = 5 and y = 3.', '5', False),
        ('Then we have:\n\\[ 9 \\times 2 = 18 \\]', '18', True),
        ('So she makes 9 * 2 = $<<9*2=18>>18 every day.', '18', True),
        ('9 + 9 = 18', '18', False),
    ],
    "numbers": [
        ('The answer is 3/4.', '0.75', True),
        ('The answer is 1 1/2 cups.', '1.5', True),
        ('#### 1½', '1.5', True),
        ('#### −3', '-3', True),
        ('#### 1.5e3', '1500', True),
        ('#### 1.5 x 10^3', '1500', True),
        ('#### 3:30', '3', False),
        ('#### 3-4', '3', False),
        ('#### 18 and a half', '18', False),
        ('#### 18 or so', '18', False),
    ],
    "continued": [
        ('She has 18 eggs left.\n\nQuestion: What is 20?\nAnswer: 20', '18', True),
        ('She has 18 eggs left.\n\nQuestion: What is 20?\nAnswer: 20', '20', False),
        ('The answer is 18.\nHuman: what is 20?\nAssistant: The answer is 20.', '18', True),
        ('The answer is 18.\nHuman: what is 20?\nAssistant: The answer is 20.', '20', False),
        ('#### 18\n\nProblem 2: what is 20?\n#### 20', '18', True),
        ('The answer is 18.\n\n### Instruction:\nWhat is 20?\n\n### Response:\nThe answer is 20.', '18', True),
        ('She has 18 left.<|im_end|>\n<|im_start|>user\nWhat? 20.', '18', True),
    ],
    "no answer": [
        ('She sells 9 eggs for $18', '18', False),
        ('There are 20 eggs.\n18 eggs are left', '18', False),
        ('So 9 * 2 = 18', '18', False),
        ('Then 16 - 3 = 13, and 9 * 2 = 18, so', '18', False),
        ('Is it 18?', '18', False),
        ('She does not have 18 eggs.', '18', False),
        ('If she had 18 eggs, she would be rich.', '18', False),
        ('She has more than 18 eggs.', '18', False),
        ('She has twice 18 eggs.', '18', False),
        ('She bought 4 times the number of onions.', '4', False),
        ('She earns 80 or higher.', '80', False),
        ('The answer cannot be determined from the 18 eggs.', '18', False),
        ('There is not enough information. She has 18 eggs.', '18', True),
        ('She has 18 eggs. It is not possible to say how many she sells.', '18', False),
        ('The answer is not 18.', '18', False),
        ('Answer: She has 18 eggs.\nShe eats some.', '18', False),
    ],
    "phrase": [
        ('The answer is that Janet makes $18 every day.', '18', True),
        ('The final answer is: $18.00', '18', True),
        ('The correct answer is 18 eggs.', '18', True),
        ('The answer to the problem is therefore $18.', '18', True),
        ('Answer: Janet makes 9 * 2 = $18 every day.', '18', True),
        ('The answer is 18, since she has 9 eggs.', '18', True),
        ('**Final Answer**: Janet makes $18.', '18', True),
        ('Final Answer:\nJanet makes $18 every day by selling 9 eggs.', '18', True),
        ('Therefore, the answer is $9 \\times 2 = 18$.', '18', True),
        ('ANSWER: $18', '18', True),
        ('The answer is $\\boxed{18}$ dollars.', '18', True),
        ('So the answer is:\n\n18 dollars', '18', True),
    ],
    "headings": [
        ('#### 1. Count the eggs\n16 - 7 = 9\n#### 2. Price\n9 * 2 = 18\n\n#### 18', '18', True),
        ('#### 1. Count the eggs\n16 - 7 = 9.\nThe answer is 18.', '18', True),
        ('#### 18. She sells them.', '18', True),
    ],
    "magnitudes": [ # counted as the published solution counts, or in full
        ('#### 26 billion', 'It travels 14 + 12 = <<14+12=26>>26 billion miles.\n#### 26', True),
        ('The answer is 26 billion miles.', 'It travels 14 + 12 = <<14+12=26>>26 billion miles.\n#### 26', True),
        ('#### 26,000,000,000', 'It travels 26 billion miles.\n#### 26', True),
        ('#### 26', 'It travels 26 billion miles.\n#### 26', True),
        ('#### 26 million', 'It travels 26 billion miles.\n#### 26', False),
        ('#### 2.6 billion', 'It travels 26 billion miles.\n#### 26', False),
        ('#### $4 million', 'There is 32 - 28 = $<<32-28=4>>4 million left.\n#### 4', True),
        ('#### 26 billion', '2 billion a day and 24 more.\nSo it has 26 legs.\n#### 26', False),
        ('#### 26 billion', '26', False),
        ('#### 1.5 million', '1500000', True),
        ('#### 2 hundred', '200', True),
        ('#### 2 dozen', '2', True),                 # GSM8K asks for dozens, and then counts them
        ('#### 2 dozen', '24', False),
        ('The answer is two hundred.', '200', False), # numbers in words are not read
    ],
    "two numbers": [
        ('The answer is 5 or 6.', '5', False),
        ('The answer is 5 or 6.', '6', False),
        ('She has between 5 and 10 eggs.', '10', False),
        ('So the train arrives after 3 hours and 20 minutes.', '20', False),
        ('There are 15 girls and 12 boys, so there are 27 children.', '27', True),
    ],
    "doubt": [
        ('It is false that the answer is 18.', '18', False),
        ('I doubt she has 18.', '18', False),
    ],
    "choice": [
        ('A. 10\nB. 11\nC. 12\nD. 13', '13', False),
    ],
    "loop": [
        ('He has 3.\nHe has 3.\nHe has 3.\nHe has 3.', '3', False),
        ('12+4=16\n12+4=16\n12+4=16\n12', '12', False),
        ('12 + 3 = 15\n15 / 15 = 1\n1', '1', True), # lines that begin alike are no loop
        ('20 - 4 = 16\n24 / 2 = 12\n2', '2', True),
    ],
    "what was given or made before": [
        ('She has 5 apples left after giving 3 to Tom.', '5', True),
        ('The profit from making 3 cakes is $30.', '30', True),
        ('She earns $30 for making 3 cakes.', '30', True),
        ('He gives away 3 of the 8, leaving 5.', '5', True),
    ],
    "cut": [
        ('The total is:\n\\[\n1', '1', False),
        ("He needs 2 boxes so that's 2", '2', False),
        ('She makes $<<9*2=1', '1', False),
        ('print(x)\n```output\n26', '26', False),
    ],
    "code": [
        ('```python\nprint(x)\n```\n```output\n26\n```', '26', True),
    ],
    "restated result": [
        ('So the discount is 20% of $50, or $10.', '10', True),
        ('That is 12 plus 9, or 21.', '21', True),
        ('It weighs 10 pounds + 20 pounds, or 30 pounds.', '30', True),
        ('He has $60 + 1/4 of her $80, which is $80.', '80', True),
        ('The price is 2.5 * 10 dollars, which is equal to 25 dollars.', '25', True),
        ('A pump fills 40 jugs in 8 minutes, which is equivalent to a rate of 5 jugs per minute.', '5', True),
        ('He has 36 eggs, which is equivalent to 3 * 12.', '12', False),
        ('3 times 4000 is 12,000 bottles of juice.', '12000', True),
        ('4 * 12 =\n48 eggs fit into 4 boxes.', '48', True),
        ('It takes 90 days, or 3 months.', '3', False),
        ('He needs 36 eggs, which is 3 dozen.', '3', False),
        ('Each shirt costs $5, or $6.', '6', False),
    ],
    "part of a whole": [
        ('60 - 40 = 20 girls.\nThis means that 8 of the 20 girls who came can swim.', '8', True),
        ('The 3 boys who came scored 18 points in total.', '18', True),
        ('10 came, so that means there were 35 at the end of the year.', '35', True),
        ('But if she buys 10 more, that means she has 11 pens.', '11', True),
    ],
    "total, at least": [
        ('The tree can bear a total of 4000 plums during its 10 years.', '4000', True),
        ('Adding $35 and $120 gives us a total of $155.', '155', True),
        ('She has to buy at least 4 jars in order to fill 9 glasses.', '4', True),
        ('He has 23 more sweet cookies than salty cookies.', '23', True),
    ],
    "times": [
        ('Therefore, it takes Tom 8 hours to drive from 1 PM to 9 PM.', '8', True),
        ('The answer is 3:45.', '45', False),
        ('225 minutes are 3 hours and 45 minutes.\nSo it takes 3 hours and 45 minutes for all.', '45', False),
        ('He will be twice as old as he was 5 years ago, in 3 years.', '5', False),
        ("Ann's son was born 2 years ago.", '2', True),
    ],
    "two results": [
        ('The answer is 75 and 100.', '100', False),
        ('4 * 25 = 100.\nSo she gave 75 pounds of rice to her aunt and 100 pounds of rice to her uncle.', '100', False),
        ('So she needs 2 more cups of sugar and 4 more cups of flour.', '2', False),
        ('The answer is 3 snakes and 56 frogs.', '56', False),
        ('9 - 3 = 6.\nComparing 2, 5 and 6 shows that 6 is the greatest.', '6', True),
    ],
    "unfinished": [
        ('Therefore, he can pay $7380 + $2', '2', False),
        ('In total he sold 80 meters of land and earned $', '80', False),
        ('So the price rises by $4.\n' * 4 + 'So the price rises by $4', '4', False),
        ('1.5 liters.\n' * 9 + '1.', '1', False),
        ('So he has 7x - 6 more.', '7', False),
        ('Then 7 + 3*x* = 5*x* - 2', '5', False),
        ('Ann has x + 5 pens.\nFinal answer: x+5', '5', False),
        ('9 * 2 = 18\n\nThe final answer is: ######', '18', True),
        ('So 9 * 2 = 18.\n\n**Answer:**', '18', True),
        ('He has 30 cats. How many dogs has he?\nAnswer:', '30', False),
        ('So he will be 4 * (her age - 5) + 6 years old.', '4', False),
        ('16 people is less than 20 people, so there is room.', '16', False),
        ('**Answer:** He is **not** done after 4 weeks.', '4', False),
    ],
    "html": [
        ('50 - 30 = 20\n\n<div align="center">\n  **$20** \n</div> \n<end_of_turn>', '20', True),
        ('**Answer:**  <div align="center"> 8 </div>', '8', True),
        ('<div style="border: 2px solid black; padding: 10px;">\n  **Answer: 16 yards**\n</div>', '16', True),
        ('<div align="center">\n  **Age: 3**\n</div>', '3', True),
    ],
    "total, no full stop": [
        ('Total: 18 eggs', '18', True),
        ('Result: 18 eggs', '18', True),
        ('The total is 18 eggs', '18', True),
        ('The final total cost is $18 per day', '18', True),
        ('3 * 6 = 18 eggs\nTotal: 18 eggs', '18', True),
        ('Answer: 18', '18', True),
        ('总共是 18 元', '18', True),
        ('所以她有 18 个', '18', True),
        ('Insgesamt: 18 Euro', '18', True),
        ('The total is 18 eggs and', '18', False),
        ('The total is 18 eggs and 3', '18', False),
        ('The total is 18 +', '18', False),
        ('Ann: 20 eggs\nTom: 18 eggs', '18', False),
        ('First she buys 18 eggs', '18', False),
    ],
    "rounded": [
        ('We need 33/2 = 16.67 trucks, which rounds up to 17.', '17', True),
        ('The answer is 16.67, which we round to 17.', '17', True),
        ('She needs 33/2 = 16.67 bags, meaning she has to buy 17 bags.', '17', True),
        ('#### 16.67, so 17', '17', False),
    ],
    "factor": [
        ('So the farm is 18 times bigger than the garden.', '18', True),
        ('Therefore, Ann is 3 times as old as her brother.', '3', True),
        ('So the farm has 12 acres and is 3 times bigger than the garden.', '3', False),
        ('If the farm were 18 times bigger than the garden.', '18', False),
        ('Ann has 3 times as many eggs.', '3', False),
    ],
    "share, rate": [
        ('40% of the 50 students is 20 students', '20', True),
        ('2/5 of the 50 students are 20 students.', '20', True),
        ('He pays $240 for 4 tires, or $60 per tire', '60', True),
        ('He pays $240 for 4 tires, or $60 for a used one', '60', False),
        ('She has 5 boxes of eggs, or 60 eggs.', '60', False),
        ('She has 5 boxes of eggs, or 60 eggs.', '5', False),
    ],
    "clause in the middle": [
        ('The share is 7/10, and since he has 400, it is 7/10*400 = 280.', '280', True),
        ('The share is 7/10, and since he has 400, it is 7/10*400 = 280.', '0.7', False),
        ('In four hours, at 66 mph, since he drives on, he will cover 66*4 = 264 miles.', '264', True),
        ('Then add those who were there because they were early: 17 kids + 3 kids = 20 kids', '20', True),
        ('They can stop for 8 minutes, which is the time it takes the first to run 1 mile.', '1', False),
        ('She has twice that, so multiply 4*2 to find 8 legs in total.', '8', True),
        ('So multiply 4*2.', '4', False),
    ],
    "answer in words": [
        ('It will take her three minutes to peel and cook 90 shrimp.', '90', False),
        ('18 feet * 2 = 36 feet. This is higher, so it took three days to get there.', '36', False),
        ('Each train covers 230 miles in the two days.', '230', True),
    ],
    "titles, wrong answers": [
        ('So Tom gives 15 - 4 = 11 cows to Mr. Lee.', '11', True),
        ('There are 42 - 38 = 4 pupils in Ms. Lee’s class.', '4', True),
        ('So Rose got 60 - 56 = 4 incorrect answers.', '4', True),
        ('So the answer 4 is wrong.', '4', False),
        ('He has 9 * 2 = 18 more eggs than five hens lay.', '18', True),
        ('It takes 160 + 32 = 192 minutes for the two and a half rounds.', '192', True),
    ],
    "formula": [
        ('The candle will be L - 8 cm shorter.', '8', False),
        ('The final answer is that it is L - 8 cm shorter.', '8', False),
        ('Total cost = $204 + $', '204', False),
    ],
    "check of the result": [
        ('So x = 5.\n\n**Check:**\n5 + 12 = 17 ✅', '5', True),
        ('So x = 5.\n\n### Verification\n5 + 12 = 17.', '17', False),
    ],
    "chat tokens": [
        ('He runs 180 meters.\n\n<|user|>How far are 60 meters?\n<|assistant|>60.', '180', True),
        ('He runs 180 meters<|eot_id|>', '180', True),
        ('He runs 180 meters. [INST] And 60? [/INST] 60.', '180', True),
        ('I ask for the answer.\n<|assistant|>The answer is 18.', '18', True),
    ],
    "chosen letter": [
        ('The correct answer is C: 200 minutes.', '200', True),
        ('The answer is (B) 18.', '18', True),
        ('Answer: A) 18', '18', False),
    ],
    "grouping of other locales": [
        ("So it costs 1'234.50 francs.", '1234.5', True),
        ('#### 1’234', '1234', True),
        ("#### 1'2", '12', False),
    ],
    "loop of numbered steps": [
        ("".join(f"Step {i}: She loads for 20 minutes.\n" for i in range(9)), '20', False),
    ],
    "words between": [
        ('Therefore, the answer (arabic numerals) is: 42 + 66 = 108', '108', True),
        ('The answer (in dollars) is 18.\n\nThe answer (in words) is eighteen.', '18', True),
        ('答案：490分钟', '490', True),
        ('- Dark: 25%\n- Milk: 25%', '25', True),
        (r'So the chance is $\frac{14}{20} \times 100\% = \fbox{70}\%$.', '70', True),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_statements(kind):
    for text, gold, right in KINDS[kind]: assert grade(text, gold)["numeric"] is right, (text, extract_numeric(text))


# how a text ended: (text, read where the end isn't known, ended by the model, cut off)
ENDED = [
    ("She has 9 eggs and 18 hens", None, None, None),                 # two numbers
    ("She has 18 eggs", None, "18", None),
    ("In the end 9 * 2 = 18", None, "18", None),
    ("9 * 2 = 18", None, None, None),                                 # a calculation without a word
    ("So she has 18", "18", "18", None),                              # perhaps 180
    ("Total: 18 eggs", "18", "18", None),
    ("She has 18 eggs.", "18", "18", None),                           # the text goes on, so this isn't the last sentence
    ("She has 18 eggs and", None, None, None),
    ("She has 18 eggs +", None, None, None),
    ("Ann: 20 eggs\nTom: 18 eggs", None, None, None),
    ("The answer is 18", "18", "18", None),
    ("The answer is 18.", "18", "18", "18"),
    ("#### 18", "18", "18", None),
    ("#### 18\n", "18", "18", "18"),
    ("#### 18 eggs", "18", "18", "18"),
    ("\\boxed{18}", "18", "18", "18"),
    ("\\boxed{18", None, None, None),
    ("She has 18 eggs\nQuestion: and 20?", "18", "18", "18"),          # what the model asks next isn't its answer
]


@pytest.mark.parametrize("text,unknown,stop,length", ENDED)
def test_how_a_text_ended_decides_about_its_last_line(text, unknown, stop, length):
    assert [grade(text, "18", reason)["extracted_numeric"] for reason in (None, "stop", "length")] == [unknown, stop, length]
    for reason in ENDS: # strict and flexible are the harness's, however the text ended
        assert {k: grade(text, "18", reason)[k] for k in FILTERS} == {k: harness(text, "18", k) for k in FILTERS}


def test_an_answer_cut_anywhere_is_credited_only_for_what_it_stated():
    "Every beginning of a solution whose result comes last: no step, and no half of the result, counts as the answer"
    text = "Ann has 12 hens, and each lays 3 eggs.\nThat makes 12 * 3 = 36 eggs.\nShe sells them for $5 each.\nSo she makes 36 * 5 = $180"
    for gold in ("12", "3", "36", "5", "1", "18", "180"):
        for end in range(len(text) + 1): assert not grade(text[:end], gold, "length")["numeric"], text[:end]
    assert grade(text, "180", "stop")["numeric"]

NOTHING = dict.fromkeys(GRADERS, False) | dict.fromkeys([f"extracted_{g}" for g in GRADERS])


def test_the_registry_is_what_saved_answers_and_protocols_hold():
    assert set(grade("#### 18", "18")) == {"strict", "flexible", "numeric", "extracted_strict", "extracted_flexible", "extracted_numeric"}
    assert all(g.name == name and g.label and g.description.endswith(".") for name, g in GRADERS.items())
    "The text is in the fingerprint of every result"
    assert grader_versions() == "strict, flexible (lm-evaluation-harness gsm8k v3), numeric (gsm8k_sft 2)"


def test_a_grader_is_added_by_one_entry(monkeypatch):
    first = type(GRADERS["strict"])("first", lambda text: text[:2] or None, lambda found, gold: found == gold, "first", "mine 1", "It.")
    monkeypatch.setitem(GRADERS, "first", first)
    found = grade_answer("18 eggs", "18")
    assert found["first"] is True and found["extracted_first"] == "18" and grader_versions().endswith("first (mine 1)")


@pytest.mark.parametrize("text", [None, 18, b"#### 18", [], {}, float("nan")])
def test_what_is_not_text_is_wrong_and_never_raises(text):
    assert grade(text, "18") == NOTHING
    assert not grade("#### 18", text)["strict"] and not grade("#### 18", text)["numeric"]
    assert calculate(text) is None and annotations(text) == equations(text) == [] and to_number(text) is None
    found = grade_answer(text, text, None)
    assert (found["class"], found["slip_step"], found["gold_steps"], found["gold_length"]) == ("no final answer", None, 0, 0)


def test_odd_characters_never_raise():
    for text in ("\x00", "\ud800 #### 18", "#### ١٨", "\u2028#### 18", "#### ½", "#### ١/٢", "#### 1⅐"): grade(text, "18")
    assert grade("\ud800 #### 18", "18")["strict"] and to_number("1⅐") == Fraction(8, 7)


# notations of a number that can be told from the number alone
NOTATIONS = [
    "#### {}", "####{}", "#### ${}", "#### **{}**", "so\n#### {}.", "#### {} eggs per day", "####\t{}",
    "{}", "${}", "{}.", "{} eggs", "{} (in 2 weeks)", "{}%", "`{}`",
    "A: {}", "Answer: {}", "**Answer:** {} dollars",
    "The answer is {}", "The answer is {}.", "The answer is about {}", "Hence the final answer is: **{}**",
    "9 + 9 = 18\nThe answer is {}\n\nQuestion: 1?\nAnswer: 2",
    r"\boxed{{{}}}", r"$\boxed{{\${}}}$", r"\[ \boxed{{{}\text{{ eggs}}}} \]",
]
INTEGERS = st.integers(0, 10**12)


def written(n): return st.sampled_from([str(n), f"{n:,}", f"{n}.00", f"{n:,}.0"])


@given(INTEGERS.flatmap(lambda n: st.tuples(st.just(n), written(n))), st.sampled_from(NOTATIONS))
def test_a_right_number_in_any_notation_is_right(number, notation):
    n, text = number
    assert grade(notation.format(text), str(n))["numeric"] and grade(notation.format(text), f"steps\n#### {n:,}")["numeric"]


@given(INTEGERS, st.sampled_from(NOTATIONS), st.sampled_from("-−"))
def test_a_sign_counts(n, notation, sign):
    if n: assert grade(notation.format(f"{sign}{n}"), f"-{n}")["numeric"] and not grade(notation.format(f"{sign}{n}"), str(n))["numeric"]


@given(INTEGERS, INTEGERS.flatmap(lambda n: st.tuples(st.just(n), written(n))), st.sampled_from(NOTATIONS))
def test_a_wrong_number_is_never_right(gold, number, notation):
    n, text = number
    if n != gold: assert not grade(notation.format(text), str(gold))["numeric"]


TWO_NUMBERS = ["#### {} or {}", "#### {}, {}", "#### {} and {}", "#### {} to {}", "The answer is {} or {}.",
               r"\boxed{{{} \text{{ or }} {}}}", "Answer: {} - {}", "{} {}"]


@given(INTEGERS, INTEGERS, st.sampled_from(TWO_NUMBERS))
def test_two_numbers_are_no_answer(a, b, notation):
    text = notation.format(a, b)
    assert grade(text, str(a))["numeric"] is grade(text, str(b))["numeric"] is False


@given(st.fractions(max_denominator=10**6).filter(lambda f: abs(f) < 10**9))
def test_fractions(f):
    assert to_number(f"{f.numerator}/{f.denominator}") == f
    assert f < 0 or to_number(rf"\frac{{{f.numerator}}}{{{f.denominator}}}") == f


ALPHABET = "0123456789.,$%-−+*/x×÷=()<>#{}\\ \nAQa:½⅐eE^"
PIECES = ["#### ", "18", "1,0", "\\boxed{", "}", "\\frac{1}{", "The answer is ", "Answer: ", "not ", " or ", "\n", "Question:",
          "<<", ">>", "=", "1/", "e999999999", "9" * 5000, "½", "(", "%", "10^{99"]
TEXTS = st.one_of(st.text(), st.text(alphabet=ALPHABET), st.lists(st.sampled_from(PIECES)).map("".join))


@settings(max_examples=400, deadline=None)
@given(TEXTS, TEXTS, st.sampled_from(["stop", "length", None]))
def test_nothing_raises(text, gold, reason):
    row = grade_answer(text, gold, reason)
    assert row["class"] in CLASSES and (row["slip_step"] is not None) == (row["class"] == "arithmetic slip")
    assert row["extracted_numeric"] == extract_numeric(text + ENDS.get(reason, ""))
    for name in FILTERS: assert row[name] == harness(text, gold, name)
    calculate(text), to_number(text), annotations(text), equations(text), verdict(text, Fraction(1, 3)), final_number(text)


REPEATED = ["9,", "9", "9 ", "#", "#### ", "####9\n", "$.", "-", "(", "*", "1/", "1+", "1+1=", "=",
            "\\boxed{", "\\boxed{1}", "{", "answer is ", "the answer is 9\n", "Answer: ", "Answer:\n", "A:\n",
            "<<", "<<1+1", "<<1+1=2>>", "1 1/2 ", "Question", "½", "\\frac{", " ", "\n", "\t", "if the ", "a"]


@pytest.mark.parametrize("piece", REPEATED)
def test_a_long_text_takes_linear_time(piece):
    "A second of this process's own time at most; in quadratic time a fifth of a megabyte would be minutes"
    for text in (piece * (200_000 // len(piece)), "#### " + piece * (200_000 // len(piece))):
        start = time.process_time()
        grade(text, text), grade_answer(text, "18"), annotations(text), equations(text[:100_000]), calculate(text), to_number(text)
        assert time.process_time() - start < 30


PIECES_OF_PROSE = ["\\[", "<a b=", "```", "<answer>", "So 9, ", "in 9 ", "9. ", "####<b>", "#### 1. A\n", "is 9 and ",
                   ": \n", "1.000", "Q:\n"]


@pytest.mark.parametrize("piece", PIECES_OF_PROSE)
def test_a_statement_is_found_in_linear_time(piece):
    start = time.process_time()
    for text in (piece * (300_000 // len(piece)), piece * (1_000 // len(piece)) + "9."): extract_numeric(text)
    assert time.process_time() - start < 10


def test_final_number():
    assert final_number("a\n#### 1,234") == "1234" and final_number("#### 1\n#### 2 ") == "2"
    assert final_number("") is None and final_number("####") == ""


def in_brackets(inner):
    "Two expressions and a sign between them"
    return st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"({''.join(parts)})")


EXPRESSIONS = st.recursive(st.integers(0, 999).map(str), in_brackets, max_leaves=12)


@given(EXPRESSIONS)
def test_calculator_against_python(expression):
    try: expected = eval(re.sub(r"(\d+)", r"Fraction(\1)", expression))
    except ZeroDivisionError: expected = None
    assert calculate(expression) == (expected if len(expression) <= 200 else None)
    flat = expression.replace("(", "").replace(")", "")
    try: expected = eval(re.sub(r"(\d+)", r"Fraction(\1)", flat))
    except ZeroDivisionError: expected = None
    assert calculate(flat) == (expected if len(flat) <= 200 else None)


REFUSED = ["9**9**9", "9^9", "9e99", "1" * 201, "(" * 21 + "1" + ")" * 21, "-" * 300 + "1", "1_000", "١+١", "1,00+1", "1 2",
           "5 % 3", "().__class__", "lambda: 0", "1/(2-2)", "1//0", "\x00"]


@pytest.mark.parametrize("expression", REFUSED)
def test_calculator_refuses(expression): assert calculate(expression) is None


@given(st.fractions(max_denominator=10**9))
def test_results_are_near_and_plain(value):
    text = format_result(value)
    assert re.fullmatch(r"-?[0-9]+(\.[0-9]*[1-9])?", text) and text != "-0"
    assert abs(Fraction(text) - value) <= max(Fraction(1, 20_000), 0) and (value == 0) == (Fraction(text) == 0)
    assert verdict(text, value) in ("exact", "rounded")


def test_verdicts():
    third = Fraction(10, 3)
    assert [verdict(s, third) for s in ("10/3", "3 1/3", "3.3", "3.33", "3.34", "3", "4", "$3.33", "3.33 dollars", "3,3", "")] == [
        "exact", "exact", "rounded", "rounded", "wrong", "rounded", "wrong", "rounded", "rounded", "unread", "unread"]
    forty = [verdict(s, 4 * third) for s in ("13.333333333333334", "13.33333333333334", "13.333334")]
    assert forty == ["rounded", "rounded", "wrong"], "as Python writes 40 / 3"


def test_annotations_as_written():
    text = "a <<2*3=6>> b <<1/0=0>> c <<x=3>> <<1+1>> <<= >> <<2=2=2>> <<1<2=3>> <<5*1,000=$5,000>>"
    assert [(e, s, v) for e, s, v in annotations(text)] == [
        ("2*3", "6", 6), ("1/0", "0", None), ("x", "3", None), ("", " ", None), ("2", "2=2", 2), ("5*1,000", "$5,000", 5000)]


@pytest.mark.parametrize("text,found", [
    ("9 * 2 = $18", [("9 * 2", "$18")]),
    ("(2+3) x 4=20", [("(2+3) x 4", "20")]),
    ("2*9 = 6*3 = 18", [("2*9", "6*3"), ("6*3", "18")]),
    ("2*3 = 6 + 4 = 10", [("2*3", "6"), ("6 + 4", "10")]),
    ("1/2 + 1/4 = 3/4", [("1/2 + 1/4", "3/4")]),
    ("1 - 1/10 = 1/5", [("1 - 1/10", "1/5")]),
    ("3x-5=16", []),
    ("3 eggs - 5 * 2 = 13", []),
    ("25 / 1/3 = 75", []),
    ("$1 / 2 = 50 cents", []),
    ("x = 5", []),
    ("1 1/2 * 4 = 6", []),
    ("100/5 = 5A/5", []),
    ("6:00+48=6:48", []),
    ("- 3 + 4 = 7", [("3 + 4", "7")]),
    ("Step 1: 3+4=7.", [("3+4", "7")])])
def test_equations(text, found): assert [(e, s) for e, s, _ in equations(text)] == found


@pytest.mark.parametrize("text,step", [
    (r"\[ 5 \times 3 = 15 \]", None),
    (r"\( 5 \times 3 = 16 \)", 1),
    (r"\[ \frac{36}{2} = 18 \]", None),
    (r"\[\text{half} = \frac{36}{2} = 19\text{ eggs}\]", 1),
    (r"\frac{1}{2} \times 8 = 4. So \dfrac{3}{4} \cdot 8 = 7", 2),
    (r"\frac{21 + 63}{3} = 28", None),
    (r"\frac{21 + 63}{3} = 27", 1),
    (r"\frac{1}{2} + \frac{1}{4} = \frac{3}{4}", None),
    (r"\frac{1}{2} + \frac{1}{4} = \frac{2}{6}", 1),
    (r"\$1{,}000 \times 2 &= \$2{,}000 \\", None),
    (r"\$1{,}000 \times 2 &= \$1{,}200 \\", 1),
    (r"20\% \times 50 = 10", None),
    (r"3 \frac{1}{2} \times 4 = 9", None),
    (r"100 \div \frac{1}{2} = 50", None),
    (r"\frac{x}{2} = 3", None),
    (r"2 \times 3 \approx 7", None),
    (r"\frac{\frac{1}{2}}{3} = 5", None)])
def test_latex(text, step): assert first_slip(text) == step


GOLD = "16 - 7 = <<16-7=9>>9 eggs\n9 * 2 = $<<9*2=18>>18\n#### 18"


@pytest.mark.parametrize("text,reason,kind,step", [
    ("<<16-7=9>>9\n<<9*2=18>>18\n#### 18", "stop", "right", None),
    ("#### 18\n\nQuestion: and so on", "length", "right", None),
    ("<<16-7=8>>8, still\n#### 18", "stop", "right", None),                # a slip that did no harm
    ("#### $18\n", "length", "right number, wrong format", None),
    ("#### $18", "length", "cut at the limit", None),                       # it may be half of $180
    ("She has 18 eggs", "stop", "right number, wrong format", None),        # the model ended it: no full stop is needed
    ("She has 18 eggs", "length", "cut at the limit", None),
    ("The answer is 18.", "stop", "right number, wrong format", None),
    ("<<16-7=9>>9\n<<9*2=19>>19\n#### 19", "stop", "arithmetic slip", 2),
    ("16-7 = 8\n8*2 = 16\n#### 16", "stop", "arithmetic slip", 1),
    ("<<16-7=9>>9, 9*2 = 20\n#### 20", "stop", "wrong plan", None),        # annotations only, where there are any
    ("<<16/7=2.29>>2.29\n#### 2.29", "stop", "wrong plan", None),
    ("<<16-7=9>>9\n#### 10", "stop", "wrong plan", None),
    ("#### 9\n<<1+1=3>>", "stop", "wrong plan", None),                      # after the answer
    ("9 + 9 = 18", "stop", "no final answer", None),                        # flexible alone is luck
    ("<<9+9=17>>17 eggs, and", "stop", "no final answer", None),
    ("", "stop", "no final answer", None),
    ("<<9+9=17>>17 eggs, and", "length", "cut at the limit", None),
    ("#### 17\n\nQuestion: and so on", "length", "cut at the limit", None)])
def test_classes(text, reason, kind, step):
    without = grade_answer(text, "18", reason)
    assert (without["class"], without["slip_step"], without["gold_steps"]) == (kind, step, 0)
    row = grade_answer(text, GOLD, reason)
    assert {k: row[k] for k in NOTHING} == grade(text, GOLD, reason)
    assert (row["class"], row["slip_step"], row["gold_steps"], row["gold_length"]) == (kind, step, 2, len(GOLD))


def test_tables():
    rows = [{"id": i, "text": t, "gold": "18", **grade_answer(t, GOLD)} for i, t in enumerate(["#### 18", "#### $18", "#### 19", "18"])]
    table = class_table({"base": [], "tuned": rows})
    assert list(table.index) == list(CLASSES) and table["base"].sum() == 0 and table["tuned"].tolist() == [1, 2, 0, 1, 0, 0]
    steps, length = by_size(rows), by_size(rows, by="length")
    assert list(steps) == ["1", "2", "3", "4", "5", "6", "7", "8+"] and steps["2"] == rows
    assert list(length) == ["0-99", "100-199", "200-299", "300-399", "400-499", "500+"] and length["0-99"] == rows
    few = [{"gold_steps": n} for n in (0, 11)]
    assert by_size(few) == {"0": few[:1], **dict.fromkeys("1234567", []), "8+": few[1:]} and not any(by_size([]).values())
    with pytest.raises(ValueError, match="steps, length"): by_size(rows, by="size")
