# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""The Chinese finding rules, on hand-made sentences and on the phrases of the finding table."""

import pytest

from m3fm.data.labels import FINDINGS, finding_table
from m3fm.evaluation.finding_labeler import label_report

PLACES = {"L": "left", "R": "right", "U": "upper", "M": "middle", "D": "lower"}
SIDES = {"left", "right"}

# text | finding:state[:places] ...; places from L, R, U, M, D. "-" means not mentioned.
CASES = """
未见胸腔积液及气胸。 | pleural_effusion:negative pneumothorax:negative
双肺未见结节、肿块及实变影。 | nodule:negative mass:negative consolidation:negative lung_lesion:negative
无胸腔积液或气胸。 | pleural_effusion:negative pneumothorax:negative
没有局灶性实变、胸腔积液或气胸的证据。 | consolidation:negative pleural_effusion:negative pneumothorax:negative
未发现肺结节。 | nodule:negative
双侧胸腔未探及积液。 | pleural_effusion:negative
未见明显肿大淋巴结。 | lymphadenopathy:negative
纵隔及双侧肺门未见肿大淋巴结影。 | lymphadenopathy:negative
排除气胸。 | pneumothorax:negative
胸腔积液未见显示。 | pleural_effusion:negative
气胸征阴性。 | pneumothorax:negative
右侧胸腔积液已消失。 | pleural_effusion:negative
原右侧气胸消失。 | pneumothorax:negative
胸膜无增厚。 | pleural_thickening:negative
主动脉壁未见钙化。 | atherosclerosis:negative calcification:negative
支气管未见明显扩张。 | bronchiectasis:negative
双肺内未见异常密度影。 | lung_opacity:negative no_finding:positive
双侧胸腔内未见异常密度影。 | pleural_effusion:negative no_finding:positive
心影大小、形态正常。 | cardiomegaly:negative
心影不大。 | cardiomegaly:negative
心脏大小正常，双侧肋膈角锐利。 | cardiomegaly:negative pleural_effusion:negative no_finding:positive
胸廓对称，纵隔居中，双肺纹理清晰。 | no_finding:positive
心肺膈未见明显异常。 | no_finding:positive
所示胸廓诸骨未见骨折征象。 | fracture:negative
未见气胸，右侧少量胸腔积液。 | pneumothorax:negative pleural_effusion:positive:R
右侧胸腔积液，未见气胸。 | pneumothorax:negative pleural_effusion:positive:R
未见实变，但可见左肺下叶磨玻璃影。 | consolidation:negative ground_glass_opacity:positive:LD
双肺未见实变影；右肺上叶见结节影。 | consolidation:negative nodule:positive:RU
可能为肺炎。 | pneumonia:uncertain
肺炎可能。 | pneumonia:uncertain
疑似新型冠状病毒肺炎。 | covid_19:uncertain pneumonia:uncertain
左下肺肺炎不除外。 | pneumonia:uncertain:LD
不除外肺结核。 | tuberculosis:uncertain
不能排除左侧气胸。 | pneumothorax:uncertain:L
肺结核待排。 | tuberculosis:uncertain
可疑右侧少量胸腔积液。 | pleural_effusion:uncertain:R
倾向肺炎。 | pneumonia:uncertain
考虑肺炎。 | pneumonia:positive
符合新型冠状病毒肺炎表现。 | covid_19:positive pneumonia:positive
考虑肺炎可能性大。 | pneumonia:uncertain
不支持新型冠状病毒肺炎。 | covid_19:negative
双肺下叶胸膜下见磨玻璃影，边缘不清。 | ground_glass_opacity:positive:LRD lung_opacity:positive:LRD pleural_thickening:-
右肺上叶见毛玻璃样密度影。 | ground_glass_opacity:positive:RU
右肺中叶及左肺上叶舌段见斑片影。 | lung_opacity:positive:LRUM
右肺上叶、中叶见结节影。 | nodule:positive:RUM lung_lesion:positive:RUM
左肺上叶及双肺下叶见条索影。 | fibrosis:positive:LRUD
右上肺野见片状密度增高影。 | lung_opacity:positive:RU
左中下肺野见实变影。 | consolidation:positive:LMD lung_opacity:positive:LMD
两肺尖见纤维条索影及钙化灶。 | fibrosis:positive:LRU calcification:positive:LRU
右下肺见团块状软组织密度影，其内见空洞。 | mass:positive:RD cavity:positive:RD lung_lesion:positive:RD
左肺下叶见斑片状实变影，其内见支气管充气征。 | consolidation:positive:LD air_bronchogram:positive:LD
右肺下叶见斑片影，其内见支气管气像。 | air_bronchogram:positive:RD lung_opacity:positive:RD
双肺小叶间隔增厚，局部呈“铺路石征”。 | septal_thickening:positive:LR ground_glass_opacity:positive:LR
双侧胸膜见局限性增厚。 | pleural_thickening:positive:LR
左侧胸膜见钙化影。 | calcification:positive:L
双侧胸腔内见弧形低密度影。 | pleural_effusion:positive:LR emphysema:-
左侧胸腔内见细条状气体密度影。 | pneumothorax:positive:L pleural_effusion:-
心包腔内见弧形低密度影。 | pericardial_effusion:positive pleural_effusion:-
左肺下叶支气管管径增宽，管壁增厚。 | bronchiectasis:positive:LD peribronchial_thickening:positive:LD
双肺下叶支气管扩张伴管壁增厚。 | bronchiectasis:positive:LRD peribronchial_thickening:positive:LRD
双肺透亮度增高，肺大疱形成。 | emphysema:positive:LR
纵隔内见多发肿大淋巴结。 | lymphadenopathy:positive
双肺下叶见网格影及磨玻璃影。 | interstitial_lung_disease:positive:LRD ground_glass_opacity:positive:LRD
双肺呈马赛克灌注。 | mosaic_attenuation:positive
心影增大，主动脉迂曲增宽。 | cardiomegaly:positive aortic_enlargement:positive
主动脉弓钙化。 | atherosclerosis:positive calcification:positive
冠状动脉走行区见钙化。 | coronary_calcification:positive calcification:positive
双肺门影增大模糊，肺水肿。 | edema:positive
左侧第5、6肋骨骨折。 | fracture:positive
胸椎轻度侧弯。 | scoliosis:positive
右侧肋膈角变钝。 | pleural_effusion:positive:R
双侧肋膈角变钝，考虑胸腔积液。 | pleural_effusion:positive:LR
右侧肋膈角锐利，左侧肋膈角变钝。 | pleural_effusion:positive:L
食管裂孔疝。 | hernia:positive no_finding:negative
左肺上叶钙化肉芽肿。 | granuloma:positive:LU calcification:positive:LU
心脏起搏器植入术后改变。 | support_devices:positive no_finding:positive
右侧锁骨下静脉置管，尖端位于上腔静脉。 | support_devices:positive
气管居中，肺门不大。 | no_finding:positive support_devices:-
双肺未见活动性病变，纵隔未见增宽。 | enlarged_cardiomediastinum:negative no_finding:positive
左肺舌叶肺不张。 | atelectasis:positive:LU
左肺下叶膨胀不全。 | atelectasis:positive:LD
右肺下叶小结节，直径约５ｍｍ。 | nodule:positive:RD
右肺上叶占位性病变，肺癌可能。 | lung_lesion:positive:RU
双肺浸润影。 | infiltration:positive:LR lung_opacity:positive:LR
双肺多发渗出性病变。 | infiltration:positive:LR
胸膜粘连。 | pleural_other:positive
左肺未钙化结节。 | nodule:positive:L calcification:-
没有局灶性实变、可疑的肺不张、大量胸腔积液或气胸。 | consolidation:negative atelectasis:negative pneumothorax:negative
肺部没有异常，如实变、气胸或胸腔积液。 | consolidation:negative pneumothorax:negative pleural_effusion:negative
已经排除了实变、气胸或大量胸腔积液。 | consolidation:negative pneumothorax:negative pleural_effusion:negative
未见可疑结节。 | nodule:negative
心脏大小处于正常的上限。 | cardiomegaly:negative
双肺内见斑片影及磨玻璃影，左肺下叶为著。 | lung_opacity:positive:LR ground_glass_opacity:positive:LR
双肺纹理增强，右肺中叶见斑片影，密度不均，其内见小低密度影。 | lung_opacity:positive:RM emphysema:-
纵隔心影左移，右肺下叶受压。 | atelectasis:positive:RD
胸腔及心包积液。 | pleural_effusion:positive pericardial_effusion:positive
右侧液气胸。 | pleural_effusion:positive:R pneumothorax:positive:R
肾上腺结节，肝内低密度影。 | nodule:- emphysema:-
既往肺结核病史。 | tuberculosis:- no_finding:positive
建议复查除外肺炎。 | pneumonia:uncertain
１．双肺未见实变；２．右侧少量胸腔积液。 | consolidation:negative pleural_effusion:positive:R
1.左肺上叶肺炎2.右侧胸膜增厚。 | pneumonia:positive:LU pleural_thickening:positive:R pleural_other:positive:R
"""


def parse(line: str) -> tuple[str, dict[str, tuple[str, set[str], set[str]] | None]]:
    text, _, expectations = line.partition(" | ")
    expected: dict[str, tuple[str, set[str], set[str]] | None] = {}
    for expectation in expectations.split():
        finding, state, *letters = expectation.split(":")
        places = {PLACES[letter] for letter in "".join(letters)}
        expected[finding] = None if state == "-" else (state, places & SIDES, places - SIDES)
    return text, expected


@pytest.mark.parametrize("line", CASES.strip().splitlines())
def test_a_sentence_has_the_findings_a_radiologist_reads(line: str) -> None:
    text, expected = parse(line)
    labels = label_report(text, "zh")
    got = {
        name: (labels[name].state, set(labels[name].sides), set(labels[name].lobes)) if name in labels else None
        for name in expected
    }
    assert got == expected


@pytest.mark.parametrize("finding", FINDINGS)
def test_every_finding_is_read_from_its_own_phrases(finding: str) -> None:
    phrases = finding_table()[finding]
    for text in phrases.present["zh"]:
        assert label_report(text, "zh")[finding].state in {"positive", "uncertain"}, text
    for text in phrases.absent["zh"]:
        label = label_report(text, "zh").get(finding)
        # "胸部可见异常" names no finding, so the rules cannot tell it from a text without any.
        assert (finding == "no_finding") or label.state == "negative", text
