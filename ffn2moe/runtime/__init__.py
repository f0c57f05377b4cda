"""Run an export: plans, engines, the operator, choice by shape. Imports no torch."""
